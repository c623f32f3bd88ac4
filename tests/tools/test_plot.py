"""Pictures of the curves that there are, and of the ladder."""

import pytest

from nanorlhf import picture
from nanorlhf.config import from_cli
from nanorlhf.tools import plot
from tests.helpers import refused
from tests.tools import test_evaluate
from tests.tools.test_evaluate import STAGES

out = test_evaluate.out  # the fixture


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.csv"


def test_a_file_that_is_not_there_is_one_line(path, capsys):
    assert "metrics.csv: No such file" in refused(capsys, picture.read, path.parent)


def test_the_picture_takes_any_rungs_beside_the_curves_that_there_are(out, tmp_path):
    rows = [{"model": f"a{sep}b", "gold": -1.0, "gold_ci": [-2, 0]} for sep in "_ $"] * 4
    for stage in (None, *STAGES):
        (out / "ladder.png").unlink(missing_ok=True)
        if stage:
            (out / stage / "metrics.csv").unlink()
        picture.ladder(out, rows, out / "ladder.png")
        assert (out / "ladder.png").stat().st_size > 5000


def test_curves_of_several_runs_and_no_column_of_them(out, tmp_path, capsys):
    flags = ["--runs", f"{out}/sft", f"{out}/ppo", "--to", f"{tmp_path}/curves.svg", "--columns"]
    plot.main(from_cli(plot.Config, [*flags, "val_loss", "kl"]))
    drawn = (tmp_path / "curves.svg").read_text()
    assert "<!-- KL from SFT, nats per response -->" in drawn and f"<!-- {out}/sft -->" in drawn
    gone = from_cli(plot.Config, [*flags, "gone"])
    assert "none of the columns gone" in refused(capsys, plot.main, gone)
