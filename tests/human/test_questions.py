"""questions.py: who is asked what, in which order."""

import json
from collections import Counter
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanorlhf.human.journal import Journal
from nanorlhf.human.questions import LATER, Question, groups, read_questions, tasks_of
from tests.helpers import refused

QUESTIONS = [Question(f"{i}?", (f"{i}a", f"{i}b"), ("m", "n"), 1) for i in range(40)]


def tasks(*args):
    return list(tasks_of(*args).values())


@given(st.text(), st.integers(0, 9), st.floats(0, 1))
def test_every_labeler_gets_every_question_once_and_some_twice(labeler, seed, repeat):
    asked = tasks(QUESTIONS, labeler, seed, repeat)
    first = [a for a in asked if not a.repeat_of]
    assert sorted(a.prompt for a in first) == sorted(q.prompt for q in QUESTIONS)
    assert len({a.id for a in asked}) == len(asked)
    by_id = {a.id: i for i, a in enumerate(asked)}
    for i, again in enumerate(asked):
        if again.repeat_of:
            before = by_id[again.repeat_of]
            assert asked[before].prompt == again.prompt
            assert i > before + LATER or all(a.repeat_of for a in asked[i:])


def test_a_share_of_them_comes_again():
    asked = tasks(QUESTIONS, "ann", 1, 0.3)
    assert 4 <= sum(bool(a.repeat_of) for a in asked) <= 22
    for n in (6, 24, 40):  # of the last ones, too
        lists = [tasks(QUESTIONS[:n], f"labeler {i}", 1, 0.3) for i in range(200)]
        share = fmean(len(asked) / n - 1 for asked in lists)
        assert abs(share - 0.3) < 4 * (0.3 * 0.7 / (200 * n)) ** 0.5, n
    assert not any(a.repeat_of for a in tasks(QUESTIONS, "ann", 1, 0.0))
    counts = Counter(a.prompt for a in tasks(QUESTIONS, "ann", 1, 1.0))
    assert sorted(counts.values()) == [2] * 40
    few = tasks(QUESTIONS[:LATER], "ann", 1, 1.0)  # nothing comes again before all have come
    assert [a.repeat_of for a in few] == [""] * LATER + [a.id for a in few[:LATER]]


def test_what_a_labeler_sees_depends_on_seed_question_and_labeler_alone():
    """Its id on the last two: what is answered is not asked again under another seed."""
    look = lambda qs, *args: {a.prompt: (a.id, a.responses) for a in tasks(qs, *args, 0)}
    everything, some = look(QUESTIONS, "ann", 1), look(QUESTIONS[:7][::-1], "ann", 1)
    assert some == {key: everything[key] for key in some}
    again = lambda qs: {a.prompt for a in tasks(qs, "ann", 1, 0.5) if a.repeat_of}
    assert again(QUESTIONS[:7]) == again(QUESTIONS) & some.keys()
    for other in (look(QUESTIONS, "bob", 1), look(QUESTIONS, "ann", 2)):
        is_bobs = other[QUESTIONS[0].prompt][0] != everything[QUESTIONS[0].prompt][0]
        assert all((other[key][0] != everything[key][0]) == is_bobs for key in other)
        swapped = sum(other[key][1] != everything[key][1] for key in other)
        assert 8 <= swapped <= 32  # of 40: neither side is anybody's


def test_neither_the_order_of_questions_nor_of_responses_is_that_of_the_file():
    asked = tasks(QUESTIONS, "ann", 1, 0)
    assert [a.prompt for a in asked] != [q.prompt for q in QUESTIONS]
    swapped = [a for a in asked if a.responses[0].endswith("b")]
    assert 8 <= len(swapped) <= 32 and swapped[0].responses[1].endswith("a")
    assert swapped[0].models == ("n", "m")


@pytest.mark.parametrize(
    "models, kind, wanted",
    [
        ("aaaa", "comparisons", [(0, 1), (2, 3)]),
        ("aaa", "comparisons", [(0, 1)]),
        ("ab", "comparisons", [(0, 1)]),
        ("aabb", "comparisons", [(0, 2), (1, 3)]),
        ("abc", "comparisons", [(0, 1), (0, 2), (1, 2)]),
        ("aabb", "rankings", [(0, 1, 2, 3)]),
    ],
)
def test_comparisons_are_of_neighbours_or_across_models(models, kind, wanted):
    assert [tuple(group) for group in groups(list(models), kind)] == wanted


def test_equal_texts_are_not_compared(tmp_path, capsys):
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps({"prompt": "p", "responses": ["x", "x", "y", "x", "y"]}) + "\n")
    compared = lambda kind: [q.responses for q in read_questions(path, kind) if not q.is_tie]
    assert compared("rankings") == [("x", "y")] and compared("comparisons") == [("y", "x")]
    assert "1 of 2 comparisons are of equal texts" in capsys.readouterr().out
    for texts in (["x", "x"], []):
        path.write_text(json.dumps({"prompt": "p", "responses": texts}) + "\n")
        assert "no two different" in refused(capsys, read_questions, path, "rankings")
    path.write_text(json.dumps({"prompt": "p", "responses": ["x", "x"]}) + "\n")
    assert "no two different" in refused(capsys, read_questions, path, "comparisons")


@pytest.mark.parametrize(
    "record, said",
    [
        ({"prompt": "p"}, "responses"),
        ({"prompt": "p", "responses": [1, 2]}, "responses"),
        ({"prompt": "p", "responses": ["x", "y"], "models": ["a"]}, "models"),
        ({"responses": ["x", "y"]}, "prompt"),
        ({"messages": [{"role": "assistant", "content": "x"}], "responses": ["x", "y"]}, "user"),
    ],
)
def test_what_is_no_sample_is_named(record, said, tmp_path, capsys):
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps(record) + "\n")
    error = refused(capsys, read_questions, path, "rankings")
    assert f"{path}:1: " in error and said in error


def test_each_text_is_credited_to_who_wrote_it_in_that_pair(tmp_path):
    path = tmp_path / "s.jsonl"
    rows = [
        {"prompt": "p", "responses": ["x", "y", "z", "x"], "models": ["a", "a", "b", "b"]},
        {"prompt": "q", "responses": ["x", "y", "x"], "models": ["a", "b", "c"]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [(q.responses, q.models) for q in read_questions(path, "comparisons")] == [
        (("x", "z"), ("a", "b")),
        (("y", "x"), ("a", "b")),
        (("x", "y"), ("a", "b")),
        (("x",), (("a", "c"),)),
        (("y", "x"), ("b", "c")),
    ]
    (ranking, _) = read_questions(path, "rankings")
    assert (ranking.responses, ranking.models) == (("x", "y", "z"), (("a", "b"), "a", "b"))
    rows = [{"prompt": "p", "responses": ["x", "y", "y"], "models": ["a", "b", "c"]}]
    path.write_text(json.dumps(rows[0]) + "\n")  # one question says all of a with b and c
    asked, tie = read_questions(path, "comparisons")
    assert (asked.responses, asked.models) == (("x", "y"), ("a", ("b", "c")))
    assert (tie.responses, tie.models, tie.is_tie) == (("y",), (("b", "c"),), True)


def test_more_responses_than_keys_are_refused_and_so_is_a_file_of_another_suffix(tmp_path, capsys):
    path = tmp_path / "many.jsonl"
    path.write_text(json.dumps({"prompt": "p", "responses": list("abcdefghij")}) + "\n")
    assert "10 responses, and 9 can be judged at once" in refused(
        capsys, read_questions, path, "rankings"
    )
    assert ".jsonl" in refused(capsys, Journal, tmp_path / "answers.csv", "rankings")
