"""functional.py against oracles (slow independent sums), invariances and orientations.

Everything is in float64. `r` is a random rollout: field names and shapes as in functional.py, with
ragged responses, some of them empty; its (B, T) fields double as the (B, K) of a ranking.
"""

import math
from statistics import fmean
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from nanorlhf import functional as fn
from tests import helpers

FIELDS = {  # which fields of a rollout each function is given
    "masked_mean": "values response_mask",
    "masked_whiten": "values response_mask",
    "masked_sd": "values response_mask",
    "log_softmax": "logits",
    "logprobs_from_logits": "logits tokens",
    "entropy_from_logits": "logits",
    "kl_exact": "logits ref_logits",
    "shaped_rewards": "scores kl response_mask",
    "gae": "rewards values response_mask",
    "policy_loss": "new_logprobs logprobs advantages response_mask",
    "value_loss": "new_values values returns response_mask",
    "explained_variance": "values returns response_mask",
    "lm_loss": "logits tokens response_mask",
    "pairwise_loss": "chosen rejected",
    "ranking_loss": "values ranks",
    "ranking_accuracy": "values ranks",
    "rating_loss": "scores ratings",
    "thumbs_loss": "scores labels",
}
DISTRIBUTION = ["log_softmax", "logprobs_from_logits", "entropy_from_logits", "kl_exact"]
MASKED = [("masked_mean",), ("masked_whiten",), ("masked_whiten", False), ("gae",), ("lm_loss",)]
MASKED += [("masked_sd",), ("shaped_rewards", 0.1), ("explained_variance",), ("ranking_loss",)]
MASKED += [("policy_loss", 0.2), ("value_loss", 0.2), ("ranking_accuracy",)]


def f64(x):
    return torch.as_tensor(x, dtype=torch.float64)


def close(actual, expected, atol=1e-9):
    expected = expected if isinstance(expected, (torch.Tensor, tuple)) else f64(expected)
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=atol, equal_nan=True)


def softplus(x):  # -log sigmoid(-x)
    return math.log1p(math.exp(x))


def call(name, r, *settings):
    return getattr(fn, name)(*(getattr(r, field) for field in FIELDS[name].split()), *settings)


def slope(name, r, *settings):
    """Gradient of the (summed) result with respect to the function's first argument."""
    first = FIELDS[name].split()[0]
    x = getattr(r, first).clone().requires_grad_()
    out = call(name, SimpleNamespace(**vars(r) | {first: x}), *settings)
    return torch.autograd.grad((out[0] if isinstance(out, tuple) else out).sum(), x)[0]


def rollout(seed, B, T, V):
    rng = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)
    integers = lambda high, *shape: torch.randint(high, shape, generator=rng)
    mask = torch.arange(T) < integers(T + 1, B)[:, None]
    mask[0, 0] = True
    r = SimpleNamespace(response_mask=mask, counted=mask.nonzero().tolist())
    r.tokens, r.ranks, r.labels = integers(V, B, T), integers(4, B, T) * mask, integers(2, B)
    r.logits, r.ref_logits = normal(B, T, V), normal(B, T, V)
    for name in "logprobs new_logprobs values new_values rewards advantages returns kl".split():
        setattr(r, name, normal(B, T))
    for name in "scores ratings chosen rejected".split():
        setattr(r, name, normal(B))
    return r


def spoiled(r, garbage):
    """A copy of the rollout with garbage wherever there is no response token."""
    bad = SimpleNamespace(**vars(r))
    for name, x in vars(r).items():
        if name == "tokens" or torch.is_tensor(x) and x.is_floating_point():
            outside = ~(r.response_mask if x.ndim > 1 else r.response_mask.any(1))
            setattr(bad, name, x.clone())
            getattr(bad, name)[outside] = -100 if name == "tokens" else garbage
    return bad


def hand(**fields):
    """A rollout of one row of four tokens, written by hand."""
    r = {name: f64(x)[None] for name, x in fields.items()}
    return SimpleNamespace(response_mask=torch.ones(1, 4, dtype=torch.bool), **r)


rollouts = st.builds(
    rollout, st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 6), st.integers(2, 5)
)
temperatures, fractions = st.sampled_from([1.0, 2.0]) | st.floats(0.3, 3), st.floats(0, 1)
clips = st.floats(0.05, 0.9)
garbages = st.sampled_from([math.nan, math.inf, -math.inf, 1e30])


one_thread = pytest.fixture(autouse=True, scope="module")(helpers.one_thread)


@pytest.mark.parametrize("function", MASKED, ids=str)
@given(r=rollouts, garbage=garbages)
def test_garbage_under_the_mask_never_matters(function, r, garbage):
    name, *settings = function
    close(call(name, spoiled(r, garbage), *settings), call(name, r, *settings), 0)


TRAINED = [("policy_loss", 0.2), ("lm_loss",), ("masked_mean",), ("value_loss", 0.2)]
TRAINED += [("ranking_loss",)]


@pytest.mark.parametrize("function", TRAINED, ids=str)
@given(r=rollouts, garbage=garbages)
def test_garbage_under_the_mask_never_reaches_a_gradient(function, r, garbage):
    name, *settings = function
    found = slope(name, spoiled(r, garbage), *settings)
    close(found, slope(name, r, *settings), 0)
    assert not found[~r.response_mask].any()


@given(rollouts)
def test_mean_and_whitening_are_numpys_over_the_mask_with_a_variance_divided_by_n(r):
    r.response_mask[:, -1] = True  # any mask, not only a prefix
    mask = r.response_mask.numpy()
    x = r.values.numpy()[mask]
    white = np.zeros(mask.shape)
    white[mask] = (x - x.mean()) / np.sqrt(x.var(ddof=0) + 1e-8)
    close(call("masked_mean", r), x.mean())
    close(call("masked_whiten", r), white)
    close(call("masked_whiten", r, False), white + x.mean() * mask)
    close(call("masked_sd", r), np.sqrt(x.var(ddof=0) + 1e-8))
    close(fn.masked_whiten(0 * r.values + 5, r.response_mask), 0 * r.values)
    assert fn.masked_mean(r.values, r.response_mask & False).isnan()  # no silent zero


@given(rollouts, temperatures)
def test_the_distribution_is_the_enumerated_softmax_of_the_logits_over_temperature(r, temperature):
    p, q = ((x / temperature).exp() for x in (r.logits, r.ref_logits))
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    close(call("log_softmax", r, temperature), p.log())
    close(call("entropy_from_logits", r, temperature), -(p * p.log()).sum(-1))
    close(call("kl_exact", r, temperature), (p * (p / q).log()).sum(-1))
    taken = [[row[v].log() for row, v in zip(*at)] for at in zip(p, r.tokens)]
    close(call("logprobs_from_logits", r, temperature), taken)
    for name in DISTRIBUTION:
        assert call(name, r).equal(call(name, r, 1.0))


@pytest.mark.parametrize("name", DISTRIBUTION)
@given(r=rollouts)
def test_a_shift_of_all_logits_of_a_state_never_matters(name, r):
    expected = call(name, r)
    r.logits, r.ref_logits = r.logits + r.values[..., None], r.ref_logits - r.kl[..., None]
    close(call(name, r), expected)


@pytest.mark.parametrize("name", [*DISTRIBUTION, "lm_loss"])
@given(r=rollouts)
def test_bfloat16_logits_are_taken_to_float32_before_anything_else(name, r):
    assert call(name, r).dtype == torch.float64
    r.logits, r.ref_logits = r.logits.bfloat16(), r.ref_logits.bfloat16()
    low = call(name, r)
    r.logits, r.ref_logits = r.logits.float(), r.ref_logits.float()
    assert low.dtype == torch.float32 and low.equal(call(name, r))


@given(rollouts)
def test_raising_a_tokens_logit_raises_its_logprob_and_heat_raises_entropy(r):
    chosen = F.one_hot(r.tokens, r.logits.shape[-1])
    close(slope("logprobs_from_logits", r), chosen - r.logits.softmax(-1))
    assert (call("entropy_from_logits", r, 1.5) > call("entropy_from_logits", r)).all()
    forbidden = F.pad(r.logits, (0, 1), value=-math.inf)  # 0 * log 0 is 0
    close(fn.entropy_from_logits(forbidden), call("entropy_from_logits", r))


def estimates(r):
    """log pi, log ref and {kind: estimate} of every token that could be sampled, (B, T, V)."""
    p, q = fn.log_softmax(r.logits), fn.log_softmax(r.ref_logits)
    return p, q, {kind: fn.kl_estimate(p, q, kind) for kind in ("k1", "k2", "k3")}


@given(rollouts)
def test_k1_and_k3_average_to_the_exact_kl_under_the_policy_and_k2_is_half_a_square(r):
    logp, ref_logp, k = estimates(r)
    for kind in ("k1", "k3"):
        close((logp.exp() * k[kind]).sum(-1), call("kl_exact", r))
    close(k["k2"], (logp - ref_logp).square() / 2)
    assert (k["k3"] >= 0).all()


def test_swapped_arguments_are_another_quantity_and_another_kind_is_an_error():
    p, q = f64([0.98, 0.02]), f64([0.5, 0.5])
    kl, reverse = 0.98 * math.log(1.96) + 0.02 * math.log(0.04), -0.5 * math.log(1.96 * 0.04)
    close(fn.kl_exact(p.log(), q.log()), kl)
    close(fn.kl_exact(q.log(), p.log()), reverse)
    for kind in ("k1", "k3"):
        close(p @ fn.kl_estimate(p.log(), q.log(), kind), kl)
        assert abs(p @ fn.kl_estimate(q.log(), p.log(), kind) - kl) > 0.2
    with pytest.raises(ValueError, match="k4"):
        fn.kl_estimate(p, q, "k4")


@given(rollouts)
def test_only_k1_belongs_in_the_reward(r):
    r.logits = r.ref_logits + 0.03 * r.logits  # near the reference, as at the start of PPO
    wanted = slope("kl_exact", r)

    def policy_gradient(reward):  # of the expected reward of one action, by enumeration
        x = r.logits.clone().requires_grad_()
        return torch.autograd.grad((fn.log_softmax(x).exp() * reward).sum(), x)[0]

    k = {kind: policy_gradient(x) for kind, x in estimates(r)[2].items()}
    close(k["k1"], wanted)
    close(policy_gradient(call("kl_exact", r)[..., None]), 0 * wanted)
    assert max(k["k2"].norm(), k["k3"].norm()) < 0.2 * wanted.norm()


@given(rollouts, fractions)
def test_rewards_are_minus_the_kl_and_the_score_on_the_last_response_token_only(r, kl_coef):
    expected = torch.zeros_like(r.kl)
    for b, t in r.counted:
        last = t + 1 == r.response_mask[b].sum()
        expected[b, t] = -kl_coef * r.kl[b, t] + last * r.scores[b]
    close(call("shaped_rewards", r, kl_coef), expected)
    r.kl = r.kl.abs() + 1  # what is left of the reward falls as the coefficient rises
    fall = call("shaped_rewards", r, kl_coef) - call("shaped_rewards", r, kl_coef + 1)
    assert (fall[r.response_mask] >= 1).all()


@given(rollouts, fractions, fractions)
def test_gae_is_the_double_sum_of_discounted_deltas(r, gamma, lam):
    value = lambda b, t: r.values[b, t] if [b, t] in r.counted else 0
    delta = lambda b, t: r.rewards[b, t] + gamma * value(b, t + 1) - value(b, t)
    advantages, returns = torch.zeros_like(r.values), torch.zeros_like(r.values)
    for b, t in r.counted:
        later = [s for c, s in r.counted if c == b and s >= t]
        advantages[b, t] = sum((gamma * lam) ** (s - t) * delta(b, s) for s in later)
        returns[b, t] = advantages[b, t] + value(b, t)
    close(call("gae", r, gamma, lam), (advantages, returns))
    to_come = (r.rewards * r.response_mask).flip(1).cumsum(1).flip(1)
    close(call("gae", r, 1.0, 1.0)[1], to_come)  # whatever the values


def test_gae_credits_a_reward_to_the_tokens_before_it_and_debits_the_value():
    zeros, second = [0, 0, 0, 0], [0, 1, 0, 0]
    rewarded, valued = hand(rewards=second, values=zeros), hand(rewards=zeros, values=second)
    close(call("gae", rewarded, 0.5, 0.5)[0], [[0.25, 1, 0, 0]])
    close(call("gae", valued, 0.5, 0.5)[0], [[0.5 - 0.25, -1, 0, 0]])
    close(call("gae", rewarded)[0], [[0.95, 1, 0, 0]])  # the defaults: gamma 1, lam 0.95


@given(rollouts, clips)
def test_policy_loss_is_the_clipped_surrogate_token_by_token(r, clip):
    rows = []
    for b, t in r.counted:
        log_ratio, a = (r.new_logprobs - r.logprobs)[b, t].item(), r.advantages[b, t].item()
        rho = math.exp(log_ratio)
        kept = min(max(rho, 1 - clip), 1 + clip)
        rows.append([-min(a * rho, a * kept), rho - 1 - log_ratio, a * kept < a * rho, rho])
    loss, *stats = f64(rows).mean(0)
    expected = loss, dict(zip(("approx_kl", "clipfrac", "ratio"), stats))
    close(call("policy_loss", r, clip), expected)


@given(rollouts, clips)
def test_on_the_rollout_policy_itself_the_policy_loss_is_the_plain_policy_gradient(r, clip):
    r.new_logprobs = r.logprobs
    assert call("policy_loss", r, clip)[1] == {"approx_kl": 0, "clipfrac": 0, "ratio": 1}
    plain = -r.advantages * r.response_mask / len(r.counted)  # of -mean(A * logprob)
    close(slope("policy_loss", r, clip), plain)  # down the loss, log-probs rise where A > 0


def test_clipping_stops_the_gradient_on_exactly_the_right_side():
    ratio = f64([0.79, 0.81, 1.19, 1.21])
    for advantage, kept in [(2, [1, 1, 1, 0]), (-2, [0, 1, 1, 1])]:
        r = hand(new_logprobs=ratio.log(), logprobs=0 * ratio, advantages=0 * ratio + advantage)
        close(slope("policy_loss", r, 0.2), -advantage / 4 * (ratio * f64(kept))[None])
        close(call("policy_loss", r, 0.2)[1]["clipfrac"], 0.25)


@given(rollouts)
def test_approx_kl_is_the_kl_of_the_rollout_policy_from_the_updated_one(r):
    old, tokens = f64([0.5, 0.25, 0.25]).log(), [0, 0, 1, 2]  # in exact proportion
    new = fn.log_softmax(old + f64([r.scores[0], 0, 1]))
    r = hand(new_logprobs=new[tokens], logprobs=old[tokens], advantages=[1, 1, 1, 1])
    close(call("policy_loss", r, 0.2)[1]["approx_kl"], fn.kl_exact(old, new))


@given(rollouts, clips)
def test_value_loss_is_the_worse_of_two_squared_errors_token_by_token(r, clip):
    worse = []
    for b, t in r.counted:
        new, old, target = (x[b, t].item() for x in (r.new_values, r.values, r.returns))
        near = min(max(new, old - clip), old + clip)
        worse.append(max((new - target) ** 2, (near - target) ** 2))
    close(call("value_loss", r, clip)[0], fmean(worse) / 2)


@given(rollouts, clips)
def test_at_the_rollouts_values_the_value_loss_is_half_the_squared_error(r, clip):
    r.new_values = r.values
    assert call("value_loss", r, clip)[1] == {"vf_clipfrac": 0}
    errors = (r.values - r.returns) * r.response_mask  # values below the returns are pulled up
    close(slope("value_loss", r, clip), errors / len(r.counted))


def test_the_value_clip_stops_a_value_that_moved_far_enough_but_not_one_that_moved_away():
    r = hand(new_values=[0.3, -0.3, 0.4, 1.9], values=[0, 0, 0, 2], returns=[1, 1, 1, 1])
    close(slope("value_loss", r, 0.2), [[0, -1.3 / 4, 0, 0.9 / 4]])
    close(call("value_loss", r, 0.2)[1]["vf_clipfrac"], 0.5)


@given(rollouts)
def test_diagnostics_carry_no_gradient_and_losses_do(r):
    r.new_logprobs.requires_grad_(), r.new_values.requires_grad_()
    for name in ("policy_loss", "value_loss"):
        loss, stats = call(name, r, 0.2)
        assert loss.requires_grad and not any(x.requires_grad for x in stats.values())


@given(rollouts)
def test_a_value_inside_the_clip_range_never_counts_as_clipped(r):
    assert call("value_loss", r, 100)[1]["vf_clipfrac"] == 0


@given(rollouts)
def test_explained_variance_is_1_for_perfect_0_for_constant_and_ignores_a_constant_bias(r):
    values, returns = r.values[r.response_mask].numpy(), r.returns[r.response_mask].numpy()
    if returns.var() < 1e-12:
        assert call("explained_variance", r).isnan()
        return
    expected = 1 - (returns - values).var() / (returns.var() + 1e-8)
    close(call("explained_variance", r), expected)
    r.values = r.values + 3
    close(call("explained_variance", r), expected, atol=1e-6)
    small = fn.explained_variance(1e-4 * r.values, 1e-4 * r.returns, r.response_mask)
    close(small, 1 - (returns - values).var() / (returns.var() + 1))  # 1e-8 is not lost
    returns = f64([1, 2, 4, 8])
    assert call("explained_variance", hand(values=returns, returns=f64([0.3] * 4))).isnan()
    little = 1.5e-12**0.5 * f64([1, -1, 1, -1])  # a variance that is just large enough
    assert not call("explained_variance", hand(values=little, returns=little)).isnan()
    for factor, share in [(1, 1), (0, 0), (2, 0), (-1, -3), (0.5, 0.75)]:
        close(
            call("explained_variance", hand(values=factor * returns, returns=returns)), share, 1e-7
        )


def test_the_kl_coefficient_rises_when_kl_is_above_its_target_by_a_bounded_step():
    for kl, error in [(6, 0), (6.6, 0.1), (5.4, -0.1), (60, 0.2), (7.5, 0.2), (0, -0.2)]:
        expected = 0.1 * (1 + error * 20 / 100)
        assert fn.adapt_kl_coef(0.1, kl, 6, 20, 100) == pytest.approx(expected)


@given(rollouts)
def test_lm_loss_is_minus_the_gathered_logprob_averaged_over_all_tokens_at_once(r):
    p = r.logits.softmax(-1)
    expected = fmean([-math.log(p[b, t, r.tokens[b, t]]) for b, t in r.counted])
    close(call("lm_loss", r), expected)
    r.logits = r.logits + F.one_hot(r.tokens, p.shape[-1])
    assert call("lm_loss", r) < expected
    r.response_mask = r.response_mask & False
    assert call("lm_loss", r) == 0 and not slope("lm_loss", r).any()  # of no token at all


@given(rollouts)
def test_pairwise_loss_is_minus_log_sigmoid_and_falls_when_chosen_is_above_rejected(r):
    expected = fmean([softplus(low - high) for high, low in zip(r.chosen, r.rejected)])
    close(call("pairwise_loss", r), expected)
    assert (slope("pairwise_loss", r) < 0).all()
    close(fn.pairwise_loss(r.chosen + 5, r.rejected + 5), expected)
    close(fn.pairwise_loss(f64([-900]), f64([100])), 1000)  # no overflow


def over_prompts(r, f):
    """Mean over prompts of the mean of f(better, worse) over the strictly ordered pairs of one."""
    prompts, K = [], range(r.ranks.shape[1])
    for s, rank in zip(r.values.tolist(), r.ranks.tolist()):
        pairs = [f(s[i], s[j]) for i in K for j in K if 0 < rank[i] < rank[j]]
        prompts += [fmean(pairs)] if pairs else []
    return f64(fmean(prompts) if prompts else 0)


@given(rollouts)
def test_ranking_loss_is_the_mean_over_prompts_of_the_mean_over_strictly_ordered_pairs(r):
    close(call("ranking_loss", r), over_prompts(r, lambda high, low: softplus(low - high)))
    one = fn.ranking_loss(f64([[1, 2, 0, 99]]), torch.tensor([[1, 1, 2, 0]]))  # tied, absent
    close(one, (softplus(-1) + softplus(-2)) / 2)
    pairs = [[0, 2], [1, 2]]  # better, worse
    assert fn.ordered_pairs(torch.tensor([[1, 1, 2, 0]]))[0].nonzero().tolist() == pairs


@given(rollouts)
def test_accuracy_and_margin_favour_scores_that_agree_with_the_ranks_and_equal_ones_are_half(r):
    r.values = r.values.round()  # some are equal
    accuracy = over_prompts(r, lambda high, low: 1 if high > low else 0.5 * (high == low))
    margin = over_prompts(r, lambda high, low: high - low)
    close(call("ranking_accuracy", r), (accuracy, margin))


@given(rollouts)
def test_order_of_completions_shift_of_scores_and_gaps_in_ranks_never_matter(r):
    expected, order = call("ranking_loss", r), r.tokens.argsort(1)
    close(fn.ranking_loss(r.values.gather(1, order), r.ranks.gather(1, order)), expected)
    close(fn.ranking_loss(r.values + r.scores[:, None], 2 * r.ranks), expected)


@given(rollouts)
def test_a_prompt_with_no_ordered_pair_is_skipped_and_dilutes_nothing(r):
    expected, row = call("ranking_loss", r), torch.arange(r.ranks.shape[1])
    useless = torch.stack([0 * row, 0 * row + 2, (row == 0) * 1])  # all absent, all tied, alone
    r.values = torch.cat([r.values, f64(row * row + 0 * useless)])
    r.ranks = torch.cat([r.ranks, useless])
    close(call("ranking_loss", r), expected)
    r.values, r.ranks = r.values[-3:], useless
    close(call("ranking_loss", r), 0)
    close(slope("ranking_loss", r), 0 * r.values)


@given(rollouts)
def test_with_two_responses_ranking_is_pairwise_and_rank_1_is_the_chosen_one(r):
    first = r.labels[:, None] > 0  # is the chosen one the first of the two?
    pair = torch.stack([r.chosen, r.rejected], 1)
    r.values = torch.where(first, pair, pair.flip(1))
    r.ranks = torch.where(first, torch.tensor([1, 2]), torch.tensor([2, 1]))
    close(call("ranking_loss", r), call("pairwise_loss", r))
    assert ((slope("ranking_loss", r) < 0) == (r.ranks == 1)).all()


@given(rollouts)
def test_rating_loss_is_the_mean_squared_error_and_pulls_scores_to_the_ratings(r):
    close(call("rating_loss", r), fmean([(s - y) ** 2 for s, y in zip(r.scores, r.ratings)]))
    assert ((slope("rating_loss", r) < 0) == (r.scores < r.ratings)).all()


@given(rollouts)
def test_thumbs_loss_is_logistic_and_raises_the_scores_of_liked_responses(r):
    expected = fmean([softplus(-s if like else s) for s, like in zip(r.scores, r.labels)])
    for labels in (r.labels, r.labels.bool()):
        close(fn.thumbs_loss(r.scores, labels), expected)
    assert ((slope("thumbs_loss", r) < 0) == (r.labels == 1)).all()
    close(fn.thumbs_loss(f64([-1000, 1000]), torch.tensor([1, 0])), 1000)  # no overflow


@given(rollouts)
def test_rank_of_counts_the_strictly_better_ratings_so_the_highest_is_1_and_equals_tie(r):
    ratings = r.tokens.tolist()
    expected = [[1 + sum(other > x for other in row) for x in row] for row in ratings]
    assert fn.rank_of(r.tokens).tolist() == expected
    assert fn.rank_of(f64(r.tokens) / 9 - 3).tolist() == expected  # only their order matters
    assert fn.rank_of(torch.tensor([[5, 0, 3, 3]])).tolist() == [[1, 4, 2, 2]]
