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
    "content",
    [
        HEAD + "0,1\n1,2,3\n",
        HEAD + "0,1,2\n1,one,\n",
        HEAD + "0,1,2,3\n",
        HEAD + "0.5,1,2\n",
        HEAD + "9" * 400 + ",1,2\n",
        "loss,val\n1,2\n",
    ],
)
def test_a_row_that_is_none_is_refused_and_the_file_named(path, capsys, content):
    path.write_text(content)
    assert "metrics.csv: no metrics of a stage" in refused(capsys, read_rows, path)
