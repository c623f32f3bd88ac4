"""The lexicon of examples/sentiment.py, which judges film reviews."""

import math

import pytest

from examples import sentiment


@pytest.fixture(autouse=True)
def words(tmp_path, monkeypatch):
    path = tmp_path / "lexicon.txt"
    path.write_text("good\t1.9\t0.9\t[2]\nbad\t-2.5\t0.6\t[-3]\n")
    monkeypatch.setenv("LEXICON", str(path))


def test_compound_is_the_sum_of_valences_squashed():
    squashed = lambda s: s / math.sqrt(s * s + 15)
    found = sentiment.lexicon(None, ["Good good film", "bad", "a film", "good bad"])
    assert found == pytest.approx([squashed(3.8), squashed(-2.5), 0, squashed(-0.6)])
    assert sentiment.positive(None, ["good", "bad", "a film"]) == [1, 0, 0]


@pytest.mark.parametrize("text, sign", [("not good", -0.74), ("isn't very very good", -0.74)])
def test_a_negation_turns_the_next_three_words(text, sign):
    alone, negated, after = sentiment.lexicon(None, ["good", text, "not at all so good"])
    s = sign * 1.9
    assert negated == pytest.approx(s / math.sqrt(s * s + 15))
    assert after == alone  # the fourth word
