"""All the mathematics of the four stages: tensors in, tensors out.

Shapes: B sequences, T response tokens, V vocabulary entries, K responses to one prompt.
Masks are bool and True counts; means over a rollout's tokens go through `masked_mean`. Logarithms
are natural, so KL and entropy are in nats. Log-softmax is taken in float32 (or float64) whatever
the compute precision.
"""

import math

import torch
import torch.nn.functional as F


def masked_mean(x, mask):
    """Mean of x where mask is True, both of one shape -> scalar. nan for an empty mask.
    masked_fill and not x * mask: where mask is False there may be inf, and inf * 0 is nan."""
    return x.masked_fill(~mask, 0).sum() / mask.sum()


def masked_whiten(x, mask, shift_mean=True):
    """(x - mean) / sd, both over the mask, the variance divided by n; 0 outside the mask.
    shift_mean=False adds the mean again."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean).masked_fill(~mask, 0)


def masked_sd(x, mask):
    """What `masked_whiten` divides by, a scalar: the sd over the mask, of the variance + 1e-8."""
    return (masked_mean((x - masked_mean(x, mask)) ** 2, mask) + 1e-8).sqrt()


def log_softmax(logits, temperature=1.0):
    """log pi(. | s) of logits (..., V) at a temperature, in at least float32."""
    return F.log_softmax(_scaled(logits, temperature), dim=-1)


def _scaled(logits, temperature):
    logits = exact(logits)
    return logits if temperature == 1 else logits / temperature  # dividing by 1 is only a copy


def exact(x):
    return x if x.dtype == torch.float64 else x.float()


def logprobs_from_logits(logits, tokens, temperature=1.0):
    """log pi(token) at each position: logits (B, T, V), tokens (B, T) -> (B, T), in nats."""
    logits = _scaled(logits, temperature)
    return logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)


def entropy_from_logits(logits, temperature=1.0):
    """H = -sum_v pi(v) log pi(v): logits (B, T, V) -> (B, T), in nats."""
    logp = log_softmax(logits, temperature)
    return torch.special.entr(logp.exp()).sum(-1)


def kl_estimate(logprobs, ref_logprobs, kind):
    """Per-token estimates of KL(policy || ref) from tokens that the policy sampled, (B, T).

        k1 = log pi - log ref            unbiased, signed; the one that belongs in the reward
        k2 = (log pi - log ref)^2 / 2    low variance, biased
        k3 = exp(-k1) - 1 + k1           unbiased, never negative

    Source: J. Schulman, "Approximating KL divergence" (2020). With the arguments swapped the
    result estimates neither direction of KL, because the samples stay the policy's.
    """
    k1 = logprobs - ref_logprobs
    if kind == "k1":
        return k1
    if kind == "k2":
        return 0.5 * k1**2
    if kind == "k3":
        return torch.expm1(-k1) + k1
    raise ValueError(f"kind must be k1, k2 or k3, got {kind!r}")


def kl_exact(logits, ref_logits, temperature=1.0):
    """sum_v pi(v) (log pi(v) - log ref(v)): two (B, T, V) -> (B, T), in nats; differentiable.
    It holds several (B, T, V) tensors at a time: call it on micro-batches."""
    logp, ref_logp = log_softmax(logits, temperature), log_softmax(ref_logits, temperature)
    return (logp.exp() * (logp - ref_logp)).sum(-1)


def shaped_rewards(scores, kl, response_mask, kl_coef):
    """r_t = -kl_coef * kl_t, plus the score on the last response token.

    InstructGPT, arXiv:2203.02155, eq. 2, spread over tokens as in arXiv:1909.08593, section 2.
    scores (B,) in reward units, kl (B, T) in nats, kl_coef in reward units per nat -> (B, T).
    A row with no response token gets no score.
    """
    rewards = (-kl_coef * kl).masked_fill(~response_mask, 0)  # (B, T)
    last = response_mask.sum(1) - 1  # (B,), -1 where there is no token: nowhere
    is_last = torch.arange(kl.shape[1], device=kl.device) == last[:, None]  # (B, T)
    return rewards + (scores[:, None] * is_last).masked_fill(~response_mask, 0)


def gae(rewards, values, response_mask, gamma=1.0, lam=0.95):
    """Generalized advantage estimation, arXiv:1506.02438, eq. 16.

        delta_t = r_t + gamma * V_{t+1} - V_t
        A_t     = delta_t + gamma * lam * A_{t+1}

    V and A are 0 after the last response token. All (B, T); returns (advantages, returns), with
    returns = advantages + values, the target of the value function.
    """
    rewards = rewards.masked_fill(~response_mask, 0)
    values = values.masked_fill(~response_mask, 0)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # (B,)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * lam * next_advantage
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def policy_loss(new_logprobs, logprobs, advantages, response_mask, cliprange):
    """Clipped surrogate, arXiv:1707.06347, eq. 7, to be minimised; all inputs (B, T).

        rho = exp(new_logprobs - logprobs)
        L   = mean over tokens of max(-A * rho, -A * clip(rho, 1 - cliprange, 1 + cliprange))

    Returns (loss, stats); approx_kl = KL(rollout policy || updated policy), estimator k3.
    """
    log_ratio = (new_logprobs - logprobs).masked_fill(~response_mask, 0)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    loss = masked_mean(torch.maximum(unclipped, clipped), response_mask)
    with torch.no_grad():
        stats = {
            "approx_kl": masked_mean(torch.expm1(log_ratio) - log_ratio, response_mask),
            "clipfrac": masked_mean((clipped > unclipped).to(ratio.dtype), response_mask),
            "ratio": masked_mean(ratio, response_mask),
        }
    return loss, stats


def value_loss(new_values, values, returns, response_mask, cliprange_value):
    """Squared error to the returns, kept near the rollout's values; all inputs (B, T).

        L = 0.5 * mean of max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2)

    As in openai/baselines and lm-human-preferences. Returns (loss, stats).
    """
    new_values, values, returns = (  # here and not later: 0 * nan in the gradient is nan
        x.masked_fill(~response_mask, 0) for x in (new_values, values, returns)
    )
    near = new_values.clamp(values - cliprange_value, values + cliprange_value)
    unclipped, clipped = (new_values - returns) ** 2, (near - returns) ** 2
    loss = 0.5 * masked_mean(torch.maximum(unclipped, clipped), response_mask)
    vf_clipfrac = masked_mean((clipped > unclipped).to(values.dtype), response_mask)
    return loss, {"vf_clipfrac": vf_clipfrac}


def explained_variance(values, returns, response_mask):
    """1 - Var(returns - values) / Var(returns) over the mask: 1 is perfect, 0 is a constant; nan
    where returns do not vary, and there is nothing to explain."""
    error = returns - values
    unexplained = masked_mean((error - masked_mean(error, response_mask)) ** 2, response_mask)
    total = masked_mean((returns - masked_mean(returns, response_mask)) ** 2, response_mask)
    return (1 - unexplained / (total + 1e-8)).masked_fill(total < 1e-12, math.nan)


def adapt_kl_coef(kl_coef, kl, kl_target, episodes, horizon):
    """The proportional controller of arXiv:1909.08593, section 2.2: steer kl towards kl_target.
    error = clip(kl / kl_target - 1, -0.2, 0.2); kl_coef *= 1 + error * episodes / horizon."""
    error = min(max(kl / kl_target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)


def lm_loss(logits, targets, mask):
    """Mean negative log-likelihood of targets (B, T) under logits (B, T, V) where mask is True.
    Positions outside the mask never reach the softmax: they cost nothing and cannot make a nan.
    Training computes the same number by `fused.head_loss`, which never holds all logits."""
    n = mask.sum()
    if n < mask.numel():  # picking every position would only be a copy
        logits, targets = logits[mask], targets[mask]  # (n, V), (n,)
    total = F.cross_entropy(exact(logits).flatten(0, -2), targets.flatten(), reduction="sum")
    return total / n.clamp(min=1)  # 0 for an empty mask


def pairwise_loss(chosen, rejected):
    """Bradley-Terry: mean of -log sigmoid(chosen - rejected), both (B,). InstructGPT,
    arXiv:2203.02155, eq. 1 with K = 2."""
    return -F.logsigmoid(chosen - rejected).mean()


def ranking_loss(scores, ranks):
    """Mean over prompts of the mean -log sigmoid over the strictly ordered pairs of one prompt.

    scores (B, K); ranks (B, K) integers, 1 is best, ties allowed, 0 is an absent response.
    InstructGPT, arXiv:2203.02155, eq. 1: all pairs of a prompt are ONE element of the batch.
    Ties are left out; a prompt without an ordered pair is skipped; none at all gives 0.
    """
    scores = scores.masked_fill(ranks == 0, 0)  # nan there would reach the others' gradients
    losses = -F.logsigmoid(scores[:, :, None] - scores[:, None, :])  # (B, K, K)
    return _mean_over_prompts(losses, ordered_pairs(ranks))


def ranking_accuracy(scores, ranks):
    """(accuracy, margin), two scalars: the share of strictly ordered pairs that the scores put in
    the same order, equal scores counting half, and the mean difference of score in these pairs.
    Both are averaged as in `ranking_loss`."""
    better = ordered_pairs(ranks)
    margins = scores[:, :, None] - scores[:, None, :]  # (B, K, K)
    right = (margins.sign() + 1) / 2
    return _mean_over_prompts(right, better), _mean_over_prompts(margins, better)


def rank_of(ratings):
    """(B, K) ratings -> ranks, 1 for the highest; equal ratings are tied."""
    return 1 + (ratings[:, :, None] < ratings[:, None, :]).sum(2)


def ordered_pairs(ranks):
    """(B, K) ranks -> (B, K, K) bool: True at [b, i, j] where i is strictly better than j."""
    present = ranks > 0
    return (ranks[:, :, None] < ranks[:, None, :]) & present[:, :, None]


def _mean_over_prompts(x, pairs):
    count = pairs.sum((1, 2))  # (B,)
    per_prompt = x.masked_fill(~pairs, 0).sum((1, 2)) / count.clamp(min=1)
    return per_prompt.sum() / (count > 0).sum().clamp(min=1)


def rating_loss(scores, ratings):
    """Mean squared error of scores (B,) to ratings (B,) standardised over the training set."""
    return F.mse_loss(scores, ratings)


def thumbs_loss(scores, labels):
    """Logistic loss of scores (B,) for labels (B,), 1 or True for like, 0 for dislike."""
    return F.binary_cross_entropy_with_logits(scores, labels.to(scores.dtype))
