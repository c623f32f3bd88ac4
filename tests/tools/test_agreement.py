"""agreement: shares, intervals and kappa against counts by hand."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanorlhf.tools import agreement
from tests.helpers import refused


def ranking(id, labeler, texts, ranks, models=("a", "b"), prompt="p", **more):
    record = {"judgement_id": id, "labeler": labeler, "prompt": prompt, "completions": texts}
    return record | {"ranks": ranks, "models": list(models)} | more


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def told(capsys, *files, **flags):
    agreement.main(agreement.Config(list(files), device="cpu", dtype="float32", **flags))
    out = capsys.readouterr().out
    return {line[2:36].strip(): line[37:] for line in out.splitlines() if line.startswith("  ")}


def test_every_line_against_counts_by_hand(tmp_path, capsys):
    path = write(
        tmp_path / "f.jsonl",
        ranking("1", "ann", ["x", "y"], [1, 2]),
        ranking("2", "bob", ["y", "x"], [2, 1], ("b", "a")),  # the same verdict, shown swapped
        ranking("3", "ann", ["x", "z"], [1, 2], ("a", "b")),
        ranking("4", "bob", ["x", "z"], [2, 1], ("a", "b")),  # the other verdict
        ranking("5", "ann", ["z", "x"], [1, 1], ("b", "a"), repeat_of="3"),  # ann, asked again
        ranking("6", "bob", ["x", "w"], [1, 1], ("a", "b")),
    )
    lines = told(capsys, path)
    assert lines["two labelers agree"].startswith("0.500 [0.095, 0.905] of 2")
    assert (
        lines["a labeler, asked again, agrees"].startswith("0.000 ")
        and "of 1" in lines["a labeler, asked again, agrees"]
    )
    # of 1, 2, 3, 4, as 5 is a repeat and 6 a tie: first, second, first, second
    assert lines["the one shown first wins"].startswith("0.500 ")
    # a wins 1, 2, 3, loses 4, ties 6
    assert lines["a beats b"].startswith("0.700 ") and lines["a beats b"].endswith("of 5")


def test_what_was_taken_back_does_not_count(tmp_path, capsys):
    undone = {"judgement_id": "1", "labeler": "ann", "undone": True}
    path = write(
        tmp_path / "f.jsonl",
        ranking("1", "ann", ["x", "y"], [1, 2]),
        undone,
        ranking("1", "ann", ["x", "y"], [2, 1]),
        {"judgement_id": "2", "labeler": "ann", "skipped": True},
    )
    assert told(capsys, path)["a beats b"].startswith("0.000 ")
    path = write(tmp_path / "g.jsonl", ranking("1", "ann", ["x", "y"], [1, 2]), undone)
    assert "no two responses" in refused(capsys, agreement.main, agreement.Config([path]))


@pytest.mark.parametrize("key, values", [("rating", [4, 2, 2]), ("label", [True, False, False])])
def test_ratings_and_thumbs_are_compared_within_an_answer(tmp_path, key, values):
    path = write(
        tmp_path / "f.jsonl",
        *[
            {"judgement_id": "1", "labeler": "ann", "prompt": "p", "completion": text, key: value}
            | {"models": [model]}
            for text, value, model in zip("zyx", values, "abc")
        ],
    )
    found = {v.texts: (v.said, v.models) for v in agreement.read_verdicts([path])}
    assert found == {
        ("y", "z"): (-1, ("b", "a")),
        ("x", "z"): (-1, ("c", "a")),
        ("x", "y"): (0, ("c", "b")),
    }


def pairs_of(table):
    """Pairs of verdicts; table[i][j] is how often one said i - 1 and the other j - 1."""
    verdict = lambda said: agreement.Verdict((), ("x", "y"), said, "ann", ("a", "b"), False, False)
    return [
        (verdict(i - 1), verdict(j - 1))
        for i in range(3)
        for j in range(3)
        for _ in range(table[i][j])
    ]


def test_kappa_is_cohens():
    # 20 + 15 of 50 equal, chance 0.5 * 0.6 + 0.5 * 0.4: the example of many textbooks
    assert math.isclose(agreement.kappa(pairs_of([[20, 0, 5], [0, 0, 0], [10, 0, 15]])), 0.4)
    assert agreement.kappa(pairs_of([[3, 0, 0], [0, 0, 0], [0, 0, 3]])) == 1
    assert agreement.kappa(pairs_of([[3, 0, 0], [0, 0, 0], [0, 0, 0]])) is None
    assert agreement.kappa([]) is None


@given(st.integers(1, 500), st.floats(0, 1))
def test_wilsons_interval_solves_its_equation_and_stays_a_share(n, mean):
    low, high = agreement.wilson(mean, n)
    assert -1e-9 <= low <= mean + 1e-9 and mean - 1e-9 <= high <= 1 + 1e-9
    for p in (low, high):  # (mean - p)^2 = z^2 p (1 - p) / n
        assert math.isclose((mean - p) ** 2, 1.96**2 * p * (1 - p) / n, abs_tol=1e-9)


def test_the_most_disputed_comes_first(tmp_path, capsys):
    records = []
    for i, dissent in enumerate((0, 1, 2)):
        for k in range(4):
            ranks = [2, 1] if k < dissent else [1, 2]
            records.append(ranking(f"{i}{k}", f"l{k}", ["x", "y"], ranks, prompt=f"question {i}"))
    path = write(tmp_path / "f.jsonl", *records)
    agreement.main(agreement.Config([path], disputed=2))
    out = capsys.readouterr().out
    assert out.index("question 2") < out.index("question 1") and "question 0" not in out
    assert "l0, l1 for | y" in out and "l2, l3 for | x" in out


def test_a_file_of_something_else_is_refused(tmp_path, capsys):
    path = write(tmp_path / "f.jsonl", {"prompt": "p", "chosen": "a", "rejected": "b"})
    assert "no judgement that `label` wrote" in refused(
        capsys, agreement.main, agreement.Config([path])
    )
    assert "which judgements" in refused(capsys, agreement.main, agreement.Config([]))
