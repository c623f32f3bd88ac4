"""Times are taken in turns and compared by their medians."""

from nanorlhf.measure import timing
from tests.tools import test_bench
from tests.tools.test_bench import CPU, runs_of

small = test_bench.small  # the fixture with its toy sizes


def test_a_ratio_above_one_is_ours_faster():
    runs = runs_of(ours=[1.0, 1.0, 2.0], theirs=[3.0, 5.0, 4.0])
    assert timing.ratio(runs["ours"], runs["theirs"]) == (4.0, 2.0, 5.0)
    assert timing.compare(runs, "ours", "theirs", "x") == {"x": 4.0}
    assert timing.compare(runs, "ours", "absent", "x") == {}


def test_whatever_is_compared_runs_in_turns(capsys):
    calls, first = [], []
    works = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    runs = timing.race("turns", works, 3, CPU)
    for i in range(0, 9, 3):
        turn = calls[-9:][i : i + 3]
        first.append(turn[0])
        assert sorted(turn) == ["a", "b", "c"]
    assert first == ["a", "b", "c"] and all(len(run.seconds) == 3 for run in runs.values())
