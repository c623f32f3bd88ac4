"""Pictures of the curves that there are, and of the ladder."""

import json

import pytest

from nanorlhf import picture
from nanorlhf.config import from_cli
from nanorlhf.run.checkpoint import find
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
    (tmp_path / "curves.svg").unlink()
    for columns in (["gone"], ["kl", "gone", "val_loss"]):
        gone = from_cli(plot.Config, [*flags, *columns])
        assert f"none of the columns gone in {out}/sft, " in refused(capsys, plot.main, gone)
    gone = from_cli(plot.Config, [*flags, "gone", "kl", "lost"])
    assert "none of the columns gone, lost in " in refused(capsys, plot.main, gone)
    assert not (tmp_path / "curves.svg").exists()
    plot.main(from_cli(plot.Config, flags[:-1]))  # of those by default some are not there
    assert "eval_gold" not in (tmp_path / "curves.svg").read_text()


@pytest.mark.parametrize(
    "stage, flag, usual, other",
    [
        ("rm", "feedback", "rankings", "ratings"),
        ("rm", "feedback", "rankings", "thumbs"),
        ("gpt", "tokenizer", "bpe", "bytes"),
        ("gpt", "vocab_size", 768, 512),
        ("sft", "val_data", [], ["mine.jsonl"]),
        ("ppo", "gold", "", "judge.py:short"),
    ],
)
def test_no_band_lies_under_columns_of_another_quantity(tmp_path, stage, flag, usual, other):
    def band(value):
        folder = tmp_path / "run" / "step_1"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "weights.pt").touch()
        config = {"stage": stage, "flags": {"data": [], flag: value}}
        (folder / "config.json").write_text(json.dumps(config))
        return picture.healthy([folder])

    column = "eval_gold" if stage == "ppo" else "val_loss"
    assert column in band(usual) and band(other) == {}


def test_a_run_in_the_embedded_world_lies_over_healthy_ones(out, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(picture, "HEALTHY", tmp_path / "healthy.csv")
    to, ppo, sft = tmp_path / "curves.svg", f"{out}/ppo", f"{out}/sft"

    def is_drawn(runs, **flags):
        for run in runs:
            path = find(run, "latest") / "config.json"
            config = json.loads(path.read_text())
            config["flags"] |= {"data": []} | flags
            path.write_text(json.dumps(config))
        plot.main(from_cli(plot.Config, ["--runs", *runs, "--to", str(to)]))
        return "<!-- healthy runs -->" in to.read_text()

    assert not is_drawn([ppo])  # there is no file
    rows = ["ppo,1,0,0,1,", "ppo,2,0,-1,2,", "ppo,1,1,2,2,3", "ppo,2,1,4,5,5", "ppo,1,2,9,9,9"]
    header = "stage,seed,step,val_loss,scores,eval_gold"
    picture.HEALTHY.write_text("\n".join([header, *rows, "sft,1,0,7,,"]))
    assert is_drawn([ppo]) and is_drawn([ppo], kl_coef=0)
    band = picture.healthy([ppo, ppo])
    assert band["val_loss"] == ([0, 1], [-1, 2], [0, 4])  # at step 2 one seed alone has a value
    assert band["eval_gold"] == ([1], [3], [5])
    assert is_drawn([sft]) and not is_drawn([ppo, sft])  # of one stage each
    assert not is_drawn([ppo], data=["mine.jsonl"])
    assert not is_drawn([ppo], reward=["judge.py:short"])
    (find(ppo, "latest") / "config.json").write_text("{")
    assert "config.json" in refused(capsys, picture.healthy, [ppo])
