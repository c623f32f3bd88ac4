"""agreement: shares, intervals and kappa against counts by hand."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanorlhf.model import RewardModel
from nanorlhf.tools import agreement
from tests.helpers import refused
from tests.tools.test_evaluate import make_gpt, save


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
    own = lines["a labeler, asked again, agrees"]
    assert own.startswith("0.000 ") and "of 1" in own
    # of 1, 2, 3, 4, as 5 is a repeat and 6 a tie: first, second, first, second
    assert lines["the one shown first wins"].startswith("0.500 ")
    path = write(
        tmp_path / "g.jsonl",
        ranking("1", "ann", ["z", "y"], [1, 2]),
        ranking("2", "ann", ["x", "y"], [1, 2]),
        ranking("3", "ann", ["x", "w"], [1, 2]),
        ranking("4", "ann", ["b", "c"], [2, 1]),
    )
    assert told(capsys, path)["the one shown first wins"].startswith("0.750 ")
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
    same = write(tmp_path / "same.jsonl", ranking("1", "ann", ["x", "y"], [1, 2]))
    assert sorted(v.sign for v in agreement.read_verdicts([path, same])) == [-1, 1]
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
    verdicts = agreement.read_verdicts([path])
    found = {v.question[1:]: (v.sign, (v.a.model, v.b.model)) for v in verdicts}
    assert found == {
        ("y", "z"): (-1, ("b", "a")),
        ("x", "z"): (-1, ("c", "a")),
        ("x", "y"): (0, ("c", "b")),
    }


def verdict(said, labeler="ann", is_repeat=False):
    return agreement.Verdict(("p", "x", "y"), labeler, is_repeat, said, None, None)


def pairs_of(table, one="ann", other="bob"):
    """Pairs of verdicts; table[i][j] is how often one said i - 1 and the other j - 1."""
    return [
        (verdict(i - 1, one), verdict(j - 1, other))
        for i in range(3)
        for j in range(3)
        for _ in range(table[i][j])
    ]


def test_kappa_is_cohens():
    # 20 + 15 of 50 equal, chance 0.5 * 0.6 + 0.5 * 0.4: the example of many textbooks
    textbook = [[20, 0, 5], [0, 0, 0], [10, 0, 15]]
    assert math.isclose(agreement.kappa(pairs_of(textbook)), 0.4)
    assert agreement.kappa(pairs_of([[3, 0, 0], [0, 0, 0], [0, 0, 3]])) == 1
    assert agreement.kappa(pairs_of([[3, 0, 0], [0, 0, 0], [0, 0, 0]])) is None
    assert agreement.kappa([]) is None
    # of three labelers, the mean over any two, by how often they met: 50 times 0.4, 6 times 1
    more = pairs_of([[3, 0, 0], [0, 0, 0], [0, 0, 3]], "ann", "eve")
    assert math.isclose(agreement.kappa(pairs_of(textbook) + more), (50 * 0.4 + 6) / 56)


@given(st.permutations([("ann", 1), ("bob", -1), ("eve", 1), ("ann", 0)]))
def test_the_order_of_lines_changes_no_agreement(lines):
    verdicts = [verdict(said, name, is_repeat=said == 0) for name, said in lines]
    first = [v for v in verdicts if not v.is_repeat]
    assert [(a.labeler, b.labeler) for a, b in agreement.pairs_of(first)] == [
        ("ann", "bob"),
        ("ann", "eve"),
        ("bob", "eve"),
    ]
    own = [(a, b) for a, b in agreement.pairs_of(verdicts) if a.labeler == b.labeler]
    assert [(a.sign, b.sign) for a, b in own] == [(1, 0)]


def test_a_reward_model_agrees_where_it_scores_the_better_one_higher(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(agreement, "score_responses", lambda m, t, asked, said: score(said))
    score = lambda said: torch.tensor([float(len(ids)) for ids in said])  # likes what is long
    path = write(
        tmp_path / "f.jsonl",
        ranking("1", "ann", ["long text", "y"], [1, 2]),
        ranking("2", "ann", ["a", "longer"], [2, 1]),
        ranking("3", "ann", ["short", "z"], [1, 2]),
        ranking("4", "ann", ["as long as this", "b"], [2, 1]),
        ranking("5", "ann", ["as long", "b"], [1, 1]),  # a tie says nothing
    )
    folder = save(tmp_path / "rm", "rm", RewardModel(make_gpt(3)))
    line = told(capsys, path, reward=str(folder))["the reward model agrees"]
    assert line.startswith("0.750 ") and line.endswith("of 4")


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
    agreement.main(agreement.Config([path], disputed=9))
    out = capsys.readouterr().out
    assert out.index("question 2") < out.index("question 1") and "question 0" not in out
    assert "l0, l1 for | y" in out and "l2, l3 for | x" in out


def test_a_file_of_something_else_is_refused(tmp_path, capsys):
    path = write(tmp_path / "f.jsonl", {"prompt": "p", "chosen": "a", "rejected": "b"})
    assert "no judgement that `label` wrote" in refused(
        capsys, agreement.main, agreement.Config([path])
    )
    assert "no file" in refused(capsys, agreement.main, agreement.Config([]))
