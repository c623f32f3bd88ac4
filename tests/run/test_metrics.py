"""metrics.csv: what a run wrote comes back, what damage did is refused, and a run that goes on
leaves no trace of having stopped."""

import pytest
import torch

from nanorlhf.config import TrainConfig
from nanorlhf.run.log import Log
from nanorlhf.run.metrics import read_rows
from nanorlhf.tools import plot
from tests.helpers import refused

HEAD = "step,loss,val_loss\n"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.csv"


def test_cells_come_back_as_they_were_written_and_blank_ones_not_at_all(path):
    path.write_text(HEAD + "0,1.50,\n1,nan,2\n")
    rows = [{"step": "0", "loss": "1.50"}, {"step": "1", "loss": "nan", "val_loss": "2"}]
    assert read_rows(path) == (["step", "loss", "val_loss"], rows)
    assert plot.read(path.parent) == {
        "loss": ([0, 1], [1.5, pytest.approx(float("nan"), nan_ok=True)]),
        "val_loss": ([1], [2.0]),
    }


@pytest.mark.parametrize(
    "content, line",
    [
        (HEAD + "0,1\n1,2,3\n", 2),
        (HEAD + "0,1,2\n1,one,\n", 3),
        (HEAD + "0,1,2,3\n", 2),
        (HEAD + "0.5,1,2\n", 2),
        (HEAD + "9" * 400 + ",1,2\n", 2),
        ("loss,step\n1,2\n", None),
    ],
)
def test_a_row_that_is_none_is_named_by_its_line(path, capsys, content, line):
    path.write_text(content)
    message = refused(capsys, read_rows, path)
    assert f"metrics.csv, line {line}: " in message if line else "not 'step'" in message


@pytest.mark.parametrize("cut", range(1, len("10,2.5,3.25\n") + 1))
def test_a_kill_may_cut_the_last_row_anywhere_and_the_run_goes_on(path, cut):
    """Wherever it was cut: a run that goes on from step 10 writes that row again."""
    whole = HEAD + "8,1,\n9,2,\n"
    path.write_text(whole + "10,2.5,3.25\n"[:cut])
    (path.parent / "timing.csv").write_text("step,seconds\n8,1.50\n9,12345.60\n1")
    log = Log(TrainConfig(out_dir=str(path.parent)), 10, 20)
    log.close()
    assert path.read_text() == whole and log.headers["metrics.csv"] == ["step", "loss", "val_loss"]
    assert (path.parent / "timing.csv").read_text() == "step,seconds\n8,1.50\n9,12345.60\n"


def test_an_empty_file_has_no_rows_and_a_run_that_goes_on_begins_it_anew(path):
    path.write_text("")
    assert read_rows(path) == ([], [])
    log = Log(TrainConfig(out_dir=str(path.parent)), 3, 9)
    log.row(3, {"loss": 1.0})
    log.close()
    assert path.read_text() == "step,loss\n3,1\n"


def test_a_step_beyond_a_million_is_written_whole(path):
    log = Log(TrainConfig(out_dir=str(path.parent)), 0, 2_000_000)
    log.row(1_234_567, {"loss": 1.0})
    log.close()
    assert read_rows(path)[1] == [{"step": "1234567", "loss": "1"}]


@pytest.mark.parametrize(
    "moved", [("metrics.csv",), ("timing.csv",), ("metrics.csv", "timing.csv")]
)
def test_a_run_goes_on_where_its_files_were_moved_away(path, moved):
    """As the message about a damaged one advises. No evaluation is due in the first row then."""
    first = Log(TrainConfig(out_dir=str(path.parent)), 0, 9)
    for step, row in enumerate([{"loss": 3.0, "val_loss": 4.0}, {"loss": 2.0}, {"loss": 1.0}]):
        first.row(step, row)
    first.close()
    for name in moved:
        (path.parent / name).unlink()
    log = Log(TrainConfig(out_dir=str(path.parent)), 2, 9)
    log.row(2, {"loss": 1.0})
    log.row(3, {"loss": 0.5, "val_loss": 0.75})
    log.close()
    before = "" if path.name in moved else "0,3,4\n1,2,\n"
    assert path.read_text() == HEAD + before + "2,1,\n3,0.5,0.75\n"
    steps = [row["step"] for row in read_rows(path.parent / "timing.csv")[1]]
    assert steps == (["2", "3"] if "timing.csv" in moved else ["0", "1", "2", "3"])


def test_a_flag_that_a_run_goes_on_with_may_bring_a_column(path):
    """--ptx_coef or --gold, for example: earlier rows have no number there, and keep theirs."""
    path.write_text(HEAD + "0,1.50,\n1,nan,2\n")
    log = Log(TrainConfig(out_dir=str(path.parent)), 2, 9)
    log.row(2, {"loss": 1.0, "ptx_loss": 5.0})
    log.row(3, {"ptx_loss": 4.0, "loss": 1e-9})
    log.close()
    rows = "0,1.50,,\n1,nan,2,\n2,1,,5\n3,1e-09,,4\n"
    assert path.read_text() == "step,loss,val_loss,ptx_loss\n" + rows


def test_a_file_that_is_removed_while_the_run_goes_on_ends_it(path, capsys):
    log = Log(TrainConfig(out_dir=str(path.parent)), 0, 9)
    log.row(0, {"loss": 1.0})
    path.unlink()
    for row in ({"loss": 1.0}, {"loss": 1.0, "val_loss": 2.0}):
        assert "metrics.csv: No such file" in refused(capsys, log.row, 1, row)
    log.close()


def test_whoever_asks_is_handed_every_row(path):
    rows = []
    log = Log(TrainConfig(out_dir=str(path.parent)), 0, 9, rows.append)
    log.row(0, {"loss": 1.5, "val_loss": torch.tensor(2.5)})
    log.row(4, {"loss": 0.1 + 0.2})
    log.close()
    assert rows == [{"step": 0, "loss": 1.5, "val_loss": 2.5}, {"step": 4, "loss": 0.1 + 0.2}]
