"""metrics.csv is read back in one way: what a run wrote comes back, what damage did is refused."""

import pytest

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
    said = refused(capsys, read_rows, path)
    assert f"metrics.csv, line {line}: " in said if line else "not 'step'" in said
