"""What a new run says of the scores of its first rollout."""

import pytest
import torch

import train_ppo
from nanorlhf.scoring import check_unit

STANDARD = torch.linspace(-1, 1, 130)[1:-1].erfinv() * 2**0.5  # mean 0, sd 1, normal


def said(capsys, scores, n_cut=0, reward="my.py:f", **flags):
    """The warnings about such scores of those that ended, beside so many that were cut."""
    cfg = train_ppo.Config(reward=reward, **flags)
    n = 9  # that every judge has left out: they tell nothing
    ended = torch.arange(len(scores) + n_cut + n) >= n_cut
    cut, left_out = torch.full((n_cut,), cfg.missing_eos_score), torch.full((n,), torch.nan)
    judged = torch.arange(len(ended)) < len(ended) - n
    rollout = {"ended": ended, "response_mask": judged[:, None].expand(-1, 4)}
    check_unit(cfg, torch.cat([cut, scores, left_out]), rollout)
    return capsys.readouterr().err


HEALTHY = [  # scores, how many are cut, flags
    (STANDARD, 4, {"reward": "out/rm"}),
    (STANDARD, 128, {}),  # half
    (STANDARD, 0, {"missing_eos_score": -1.0}),
    (STANDARD - 2.8, 0, {"missing_eos_score": -6.0}),
    (STANDARD - 2.8, 0, {"score_unended": True}),
    ((STANDARD > 1).float(), 9, {}),  # right or wrong, most are wrong
    ((STANDARD > -1).float(), 9, {"missing_eos_score": 0.0}),  # most are right
    (STANDARD[:0], 0, {"score_unended": True}),
]


@pytest.mark.parametrize("scores, n_cut, flags", HEALTHY, ids=range(len(HEALTHY)))
def test_of_usual_scores_nothing_is_said(capsys, scores, n_cut, flags):
    assert said(capsys, scores, n_cut, **flags) == ""


NEAR = [  # scores, flags, share of those that are no better than not to end
    (STANDARD - 2.8, {}, "42%"),
    (STANDARD - 40, {}, "100%"),
    ((STANDARD > 1).float(), {"missing_eos_score": 0.0}, "84%"),
    (0.4 * STANDARD - 2.7, {}, "23%"),
]


@pytest.mark.parametrize("scores, flags, share", NEAR, ids=range(len(NEAR)))
def test_where_not_to_end_costs_many_nothing_it_is_said_at_once(capsys, scores, flags, share):
    found = said(capsys, scores, 4, **flags)
    assert f"{share} of the responses that ended score no higher than --missing_eos_" in found
    assert found.count("warning") == 1 and f"their mean is {scores.mean():.3g}" in found
    assert said(capsys, scores, 4, **flags, score_unended=True) == ""


def test_where_most_is_cut_it_is_said_with_what_helps(capsys):
    found = said(capsys, STANDARD[:10], 118, max_new_tokens=16)
    assert found.count("warning") == 1 and "92% of the responses are cut" in found
    assert "more --max_new_tokens than 16, or --score_unended" in found
    assert "100% of the responses are cut" in said(capsys, STANDARD[:0], 8)
    assert said(capsys, STANDARD[:10], 118, score_unended=True) == ""
