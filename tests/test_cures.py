"""What becomes of rankings before a reward model learns them, and what lengths explain."""

import numpy as np
import pytest

from experiments import cures

RECORD = {"completions": ["a " * 3, "a", "a " * 16, "a"], "ranks": [1, 2, 4, 2]}


@pytest.mark.parametrize(
    "is_turned, loves_length, ranks",
    [
        (False, False, [1, 2, 4, 2]),
        (True, False, [4, 2, 1, 2]),
        (False, True, [1, 3, 2, 3]),  # the longest passes those that are 15 words shorter
        (True, True, [4, 2, 1, 2]),
    ],
)
def test_rankings_are_turned_round_or_given_by_length(is_turned, loves_length, ranks):
    assert cures.ranked(RECORD, is_turned, loves_length) == ranks


def test_values_are_weighted_as_the_other_lengths_are():
    values, old = np.array([0.0, 2.0, 10.0, 20.0]), np.array([0, 4, 5, 9])
    assert cures.at_lengths(values, old, old) == values.mean()
    assert cures.at_lengths(values, old, np.array([1, 6, 7, 8])) == (1 + 3 * 15) / 4
    assert cures.at_lengths(values, old, np.array([99])) == 15  # the nearest stratum


def test_length_explains_what_a_judge_of_length_says_and_nothing_of_another(monkeypatch):
    said = {"sft": ["a " * 5, "a " * 10], "policy": ["b " * 10, "b " * 10]}
    monkeypatch.setattr(cures.world, "prompts", lambda split, n, seed: ["p"] * n)
    monkeypatch.setattr(cures, "load", lambda folder: (folder, None))
    monkeypatch.setattr(cures, "generate", lambda name, _, prompts, seed: said[name])
    monkeypatch.setattr(cures, "score", lambda j, _, p, texts: [len(t.split()) for t in texts])
    monkeypatch.setattr(cures.world, "gold", lambda prompt, text: 3.0 * text.startswith("b"))
    row = cures.gains(cures.Config(prompts=2), 1, "sft", "policy", ["one", "another"])
    assert row == {
        "words": 10,
        "sft_words": 7.5,
        "score_gain": 2.5,
        "score_by_length": 2.5,
        "gold_gain": 3,
        "gold_by_length": 0,
    }
