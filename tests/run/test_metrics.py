"""metrics.csv: what a run wrote comes back, what damage did is refused, and a run that goes on
leaves no trace of having stopped."""

import pytest

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
    assert path.read_text() == whole and log.header == ["step", "loss", "val_loss"]
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
