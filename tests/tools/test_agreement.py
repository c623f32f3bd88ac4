"""agreement: shares, intervals and kappa against counts by hand."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanorlhf.data.examples import load_feedback
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
    other = write(tmp_path / "other.jsonl", ranking("3", "ann", ["x", "y"], [1, 2]))
    verdicts = agreement.read_verdicts([path, other])
    assert sorted(v.says for v in verdicts if v.a is not v.b) == [-1, 1]
    path = write(tmp_path / "g.jsonl", ranking("1", "ann", ["x", "y"], [1, 2]), undone)
    assert "no judgement in it" in refused(capsys, agreement.main, agreement.Config([path]))


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
    found = {v.question[1:]: (v.says, *v.a.models, *v.b.models) for v in verdicts}
    assert found == {
        ("y", "z"): (-1, "b", "a"),
        ("x", "z"): (-1, "c", "a"),
        ("x", "y"): (0, "c", "b"),
        **{(text,): (value, m, m) for text, value, m in zip("zyx", values, "abc")},
        **{(text, text): (0, m, m) for text, m in zip("zyx", "abc")},
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


# of four observers, twelve units: Krippendorff (2011), section C, where alpha for interval data is
# 0.849
PUBLISHED = """
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 .
"""


def rated(rows):
    """Pairs of two labelers' verdicts on the same response; rows[i][u]: what i gives u, or None."""
    verdicts = [
        agreement.Verdict(("p", f"unit {u}"), f"labeler {i}", False, value, None, None)
        for i, row in enumerate(rows)
        for u, value in enumerate(row)
        if value is not None
    ]
    return agreement.pairs_of(verdicts)


def test_alpha_is_krippendorffs():
    rows = [[None if x == "." else int(x) for x in row.split()] for row in PUBLISHED.split("\n")]
    assert round(agreement.alpha(rated(rows)), 3) == 0.849
    assert agreement.alpha(rated([[0, 5, 3], [0, 5, 3]])) == 1
    assert agreement.alpha(rated([[4, 4], [4, 4]])) is None and agreement.alpha([]) is None


VALUES = st.lists(st.sampled_from([None, 0, 1, 2.5, 5]), min_size=4, max_size=4)


@given(st.lists(VALUES, min_size=2, max_size=4))
def test_alpha_is_one_minus_observed_over_expected_difference(rows):
    units = [[x for x in unit if x is not None] for unit in zip(*rows)]
    units = [unit for unit in units if len(unit) > 1]
    values = [x for unit in units for x in unit]
    n, differences = len(values), lambda xs: sum((x - y) ** 2 for x in xs for y in xs)
    if n and differences(values):
        observed = sum(differences(unit) / (len(unit) - 1) for unit in units) / n
        expected = differences(values) / (n * (n - 1))
        found = agreement.alpha(rated(rows))
        assert math.isclose(found, 1 - observed / expected, abs_tol=1e-9)
    else:
        assert agreement.alpha(rated(rows)) is None


@pytest.mark.parametrize(
    "key, high, low, again", [("label", True, False, False), ("rating", 5, 0, 1)]
)
def test_who_says_the_opposite_does_not_agree(tmp_path, capsys, key, high, low, again):
    """One likes both answers, another neither; in order they agree all the same. Of 2 n values n
    are high and n low: the mean square difference is d^2 within a response, and d^2 n / (2 n - 1)
    of any two values."""
    records = []
    for i in range(20):
        for id, labeler, value, more in (
            (f"{i}-ann", "ann", high, {}),
            (f"{i}-bob", "bob", low, {}),
            (f"{i}-ann-again", "ann", again, {"repeat_of": f"{i}-ann"}),
        ):
            head = {"judgement_id": id, "labeler": labeler, "prompt": f"question {i}"} | more
            records += [
                head | {"completion": f"answer {k}", "models": [f"m{k}"], key: value}
                for k in range(2)
            ]
    path = write(tmp_path / "f.jsonl", *records)
    lines = told(capsys, path)
    for line in ("two labelers agree", "a labeler, asked again, agrees"):
        share, _, alpha = lines[line].partition(", alpha ")
        assert share == "0.000 [0.000, 0.088] of 40"
        assert math.isclose(float(alpha), 1 - (2 * 40 - 1) / 40, abs_tol=0.006)
    for line in ("two labelers agree on the order", "asked again, agrees on the order"):
        assert lines[line].startswith("1.000 ") and lines[line].endswith("of 20")
    agreement.main(agreement.Config([path]))
    out = capsys.readouterr().out
    assert "20 pairs" not in out and "40 pairs of responses, 80 by themselves" in out


@pytest.mark.parametrize("how", ["named twice", "a copy", "appended to itself"])
@pytest.mark.parametrize("kind", ["comparisons", "ratings"])
def test_a_judgement_counts_once_however_often_it_is_read(tmp_path, capsys, how, kind):
    """By its judgement_id, in `agreement` and in what train_rm.py reads."""
    if kind == "comparisons":
        records = [ranking(f"{i}", "ann", ["x", f"y {i}"], [1, 2]) for i in range(4)]
    else:
        head = {"labeler": "ann", "prompt": "p", "models": ["a"]}
        records = [
            head | {"judgement_id": f"{i}", "completion": f"{i}{k}", "rating": k}
            for i in range(4)
            for k in range(2)
        ]
    path = write(tmp_path / "f.jsonl", *records)
    files = {"named twice": [path] * 3, "a copy": [path, write(tmp_path / "g.jsonl", *records)]}
    files["appended to itself"] = [write(tmp_path / "h.jsonl", *records, *records)]
    assert told(capsys, *files[how]) == told(capsys, path)
    once, more = load_feedback([path])[1], load_feedback(files[how])[1]
    assert [e.completions for e in more] == [e.completions for e in once]
    assert [e.target for e in more] == [e.target for e in once]


def test_a_copy_brings_nothing_back_that_was_taken_back(tmp_path, capsys):
    kept = ranking("1", "ann", ["x", "y"], [1, 2])
    taken = ranking("2", "ann", ["x", "z"], [1, 2])
    backup = write(tmp_path / "backup.jsonl", kept, taken)
    undone = {"judgement_id": "2", "labeler": "ann", "undone": True}
    path = write(tmp_path / "f.jsonl", kept, taken, undone)
    assert len(load_feedback([backup, path])[1]) == 1
    assert told(capsys, backup, path)["a beats b"].endswith("of 1")


def test_equal_answers_are_half_a_win_and_are_named(tmp_path, capsys):
    tie = {"skipped": True}
    path = write(
        tmp_path / "f.jsonl",
        *[ranking(f"t{i}", "ann", ["x", "x"], [1, 1], prompt=f"{i}", **tie) for i in range(8)],
        ranking("1", "ann", ["x", "y"], [2, 1]),
        ranking("2", "ann", ["z", "w"], [1, 2], ("b", "a")),
    )
    lines = told(capsys, path)
    assert lines["a beats b"].startswith("0.400 ")
    assert lines["a beats b"].endswith("of 10, 8 of them equal texts")
    assert lines["the one shown first wins"].endswith("of 2")


def test_a_text_of_several_models_is_of_each(tmp_path, capsys):
    """Of three models a and b wrote the best answer."""
    models = [["a", "b"], "b", "c"]
    path = write(tmp_path / "f.jsonl", ranking("1", "ann", ["x", "y", "z"], [1, 2, 3], models))
    lines = told(capsys, path)
    a_b = lines["a beats b"]  # better than one answer, and a tie with the other
    assert a_b.startswith("0.750 ") and a_b.endswith("of 2, 1 of them equal texts")
    assert lines["a beats c"].startswith("1.000 ") and lines["a beats c"].endswith("of 1")
    assert lines["b beats c"].startswith("1.000 ") and lines["b beats c"].endswith("of 2")


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
    assert [(a.says, b.says) for a, b in own] == [(1, 0)]


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


def test_a_file_of_something_else_is_refused(tmp_path, capsys):
    path = write(tmp_path / "f.jsonl", {"prompt": "p", "chosen": "a", "rejected": "b"})
    assert "no judgement that `label` wrote" in refused(
        capsys, agreement.main, agreement.Config([path])
    )
    assert "no file" in refused(capsys, agreement.main, agreement.Config([]))


BROKEN = [  # what stands in a line that `label` did not write so, and what is said
    ({"ranks": ["1", "2"]}, "'ranks'"),
    ({"ranks": []}, "'ranks'"),
    ({"ranks": [1, 2, 3]}, "'ranks'"),
    ({"ranks": None}, "no judgement"),
    ({"completions": ["x"]}, "'ranks'"),
    ({"completions": "xy"}, "'completions' must be a list"),
    ({"completions": [1, 2]}, "needs a string 'completions'"),
    ({"completions": [[{"role": "user", "content": "x"}], "y"]}, "begins with a user turn"),
    ({"completions": []}, "nothing in them"),
    ({"completions": None}, "no judgement"),
    ({"prompt": 3}, "needs a string 'prompt'"),
    ({"prompt": None}, "no judgement"),
    ({"labeler": 5}, "labeler"),
    ({"labeler": ["a"]}, "labeler"),
    ({"models": [1, 2]}, "models"),
    ({"models": [[1], ["b"]]}, "models"),
    ({"models": ["a"]}, "models"),
    ({"models": ["a", "b", "c"]}, "models"),
    ({"models": "ab"}, "models"),
    ({"models": 5}, "models"),
    ({"judgement_id": None}, "no judgement"),
]
RATED = {"judgement_id": "1", "labeler": "ann", "prompt": "p", "models": ["a"], "completion": "x"}
DIALOGUE = [{"role": role, "content": "x"} for role in ("assistant", "user", "assistant")]
BROKEN_RATINGS = [
    *[({"rating": x}, "'rating'") for x in ("five", math.nan, math.inf, 99, -1, True, [3])],
    ({"rating": None}, "no judgement"),
    ({"label": "perhaps"}, "'label'"),
    ({"rating": 3, "models": ["a", "b"]}, "models"),
    ({"rating": 3, "models": "a"}, "models"),
    ({"rating": 3, "completion": 5}, "needs a string 'completion'"),
    ({"rating": 3, "completion": DIALOGUE}, "texts"),
]


@pytest.mark.parametrize(
    "record, says",
    [(ranking("1", "ann", ["x", "y"], [1, 2]) | broken, says) for broken, says in BROKEN]
    + [(RATED | broken, says) for broken, says in BROKEN_RATINGS],
)
def test_a_line_that_is_no_judgement_is_named_and_nothing_of_it_is_read(
    tmp_path, capsys, record, says
):
    path = write(tmp_path / "f.jsonl", ranking("0", "ann", ["x", "z"], [1, 2]), record)
    error = refused(capsys, agreement.main, agreement.Config([path]))
    assert f"{path}:2: " in error and says in error, error


def test_a_judgement_is_read_as_the_reward_model_reads_it(tmp_path):
    """A number as text, a reply as a message, a prompt as messages, two kinds under one id."""
    said = {"role": "assistant", "content": "x"}
    asked = [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}]
    path = write(
        tmp_path / "f.jsonl",
        RATED | {"rating": "5", "completion": [said], "prompt": asked},
        RATED | {"label": "dislike", "completion": "y"},
    )
    levels = [v for v in agreement.read_verdicts([path]) if len(v.question) == 2]
    assert [(v.question, v.says) for v in levels] == [
        (((("system", "s"), ("user", "p")), "x"), 5),
        (((("user", "p"),), "y"), 0),
    ]
