"""Pictures of the curves that there are, and of the ladder."""

import pytest

from nanorlhf.tools import plot
from tests.helpers import refused
from tests.tools import test_evaluate
from tests.tools.test_evaluate import STAGES

out = test_evaluate.out  # the fixture


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.csv"


def test_a_file_that_is_not_there_is_one_line(path, capsys):
    assert "metrics.csv: No such file" in refused(capsys, plot.read, path.parent)


def test_the_picture_takes_any_rungs_beside_the_curves_that_there_are(out, tmp_path):
    rows = [{"model": f"a{sep}b", "gold": -1.0, "gold_ci": [-2, 0]} for sep in "_ $"] * 4
    for stage in (None, *STAGES):
        (out / "ladder.png").unlink(missing_ok=True)
        if stage:
            (out / stage / "metrics.csv").unlink()
        plot.ladder(out, rows)
        assert (out / "ladder.png").stat().st_size > 5000
