"""The doctor called to runs that have ended, or were damaged."""

import shutil
from pathlib import Path

import pytest

from nanorlhf.config import from_cli
from nanorlhf.tools import doctor as tool
from tests.helpers import refused
from tests.run.test_doctor import RECORDED, ROOT


def test_the_tool_reads_several_folders_and_says_which_is_healthy(tmp_path, capsys):
    runs = [str(tmp_path / name) for name in ("healthy", "no_penalty")]
    for run in runs:
        Path(run).mkdir()
        shutil.copy(ROOT / "tests/recorded" / f"{Path(run).name}.csv", f"{run}/metrics.csv")
    tool.main(from_cli(tool.Config, runs))
    out = capsys.readouterr().out
    assert f"{runs[0]}: healthy: 25 rows, nothing to report" in out
    assert f"{runs[1]}: KL running away: kl 25.7 at step 16\n  the policy" in out
    assert out.count("Try: ") == len(RECORDED["no_penalty"])


HEAD = "step,loss,val_loss\n"
DAMAGED = {
    "absent": None,
    "empty": "",
    "a header alone": HEAD,
    "another file": "hello\nworld\n",
    "a word for a number": HEAD + "0,1,\n1,one,\n",
    "a row that is too long": HEAD + "0,1,2,3\n1,2,3\n",
    "a row that is cut, amid others": HEAD + "0,1\n1,2,3\n",
    "no step": HEAD + ",1,2\n",
    "a step that is no number": HEAD + "nan,1,2\n",
    "binary": b"step,loss\n\xff\x00\xfe,1\n",
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_folder_without_readable_metrics_is_one_line_and_status_2(tmp_path, capsys, damage):
    content = DAMAGED[damage]
    if content is not None:
        (tmp_path / "metrics.csv").write_bytes(content.encode() if damage != "binary" else content)
    assert "metrics.csv" in refused(capsys, tool.main, tool.Config([str(tmp_path)]))


def test_a_last_row_that_is_being_written_is_left_for_later(tmp_path, capsys):
    (tmp_path / "metrics.csv").write_text(HEAD + "0,1,2\n1,1")
    tool.main(tool.Config([str(tmp_path)]))
    assert "1 rows" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_config_is_one_line_too(tmp_path, capsys, content):
    (tmp_path / "metrics.csv").write_text(HEAD + "0,1,2\n")
    (tmp_path / "step_1").mkdir()
    (tmp_path / "latest").write_text("step_1")
    (tmp_path / "step_1/config.json").write_text(content)
    assert "config.json" in refused(capsys, tool.main, tool.Config([str(tmp_path)]))
