"""Chapter 7, beyond: other estimators, no reward model, a verifier; and your own algorithm.

Shapes: B responses, T tokens, K responses to one prompt, side by side.
"""

import importlib
from math import comb
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from nanorlhf import functional as f
from nanorlhf.course.exercises import Exercise, compare, must


def rloo(cfg, rollout, scores, kl_coef):
    """An estimator for `train_ppo.main(cfg, estimate=rloo)`: REINFORCE, leave one out,
    arXiv:2402.14740, eq. 8. With R_i the sum of a response's rewards, KL penalty included,

        A_i = R_i - mean of the other R_j of the same prompt,    at every token of the response.

    rollout: "response_mask", "logprobs", "ref_logprobs", all (B, T); scores (B,). The
    cfg.rollouts_per_prompt responses to one prompt are side by side. Returns {"rewards",
    "advantages"}, both (B, T)."""
    mask, K = rollout["response_mask"], cfg.rollouts_per_prompt
    kl = f.kl_estimate(rollout["logprobs"], rollout["ref_logprobs"], "k1")
    rewards = f.shaped_rewards(scores, kl, mask, kl_coef)
    R = rewards.sum(1).view(-1, K)
    advantages = (R - (R.sum(1, keepdim=True) - R) / (K - 1)).view(-1, 1).expand(mask.shape)
    return {"rewards": rewards, "advantages": advantages.masked_fill(~mask, 0)}


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """Direct preference optimisation, arXiv:2305.18290, eq. 7: the mean of
    -log sigmoid(r(chosen) - r(rejected)), where r = beta log(pi / ref). All (B,), the
    log-probabilities of whole responses, in nats."""
    r = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    return -F.logsigmoid(r[0] - r[1]).mean()


def pass_at_k(n, c, k):
    """The chance that one of k samples is right, from n samples c of which were: the unbiased
    estimate of arXiv:2107.03374, eq. 1. n >= k."""
    return 1 - comb(n - c, k) / comb(n, k)


def estimate(cfg, rollout, scores, kl_coef):
    """Yours. rollout: "response_mask", "logprobs", "ref_logprobs", all (B, T); scores (B,); kl_coef
    in reward units per nat. Returns {"rewards", "advantages"}, both (B, T), which PPO's clipped
    update then takes. There is no value function."""
    mask = rollout["response_mask"]
    kl = f.kl_estimate(rollout["logprobs"], rollout["ref_logprobs"], "k1")
    rewards = f.shaped_rewards(scores, kl, mask, kl_coef)
    R = rewards.sum(1, keepdim=True)
    return {
        "rewards": rewards,
        "advantages": (R - R.mean()).expand(mask.shape).masked_fill(~mask, 0),
    }


def leave_one_out(rloo):
    """Leave one out.

    A response is measured against the others to the same prompt: no value function is needed. Write
    the estimator, in the form in which train_ppo.py takes one.

    Predict: all K responses to a prompt have the same reward. What is learned from them?

    Answer: nothing: their advantages are 0. A prompt that is always or never solved teaches
    nothing, and a batch of such prompts costs as much as any other.

    Hint: `f.kl_estimate` and `f.shaped_rewards` make the rewards; then `.view(-1, K)` groups them.

    Hint: the mean of the others is (sum - R_i) / (K - 1).

    Run: python -m experiments.train_rloo --out_dir out/rloo
    """
    torch.manual_seed(0)
    cfg, scores = SimpleNamespace(rollouts_per_prompt=3), torch.randn(6)
    mask = torch.arange(4) < torch.tensor([4, 2, 3, 1, 4, 4])[:, None]
    rollout = {
        "response_mask": mask,
        "logprobs": torch.randn(6, 4),
        "ref_logprobs": torch.zeros(6, 4),
    }
    got, flat = rloo(cfg, rollout, scores, 0.5), lambda R: R.view(-1, 1).expand(6, 4) * mask
    rewards = f.shaped_rewards(scores, rollout["logprobs"], mask, 0.5)
    R = rewards.sum(1).view(-1, 3)
    centred, bare = R - R.mean(1, keepdim=True), scores.view(-1, 3)
    mistakes = {
        "the baseline holds the response itself: it is 2/3 of what it should be": flat(centred),
        "the KL penalty is missing": flat(1.5 * (bare - bare.mean(1, keepdim=True))),
        "the baseline is of the whole batch, other prompts too": flat((R - R.mean()) * 6 / 5),
        "there is no baseline": flat(R),
        "this is GRPO: divided by the sd of the group": (
            flat(centred / R.std(1, keepdim=True, correction=0))
        ),
        "there are advantages on padding": (1.5 * centred).view(-1, 1).expand(6, 4),
    }
    compare("the advantage", got["advantages"], flat(1.5 * centred), mistakes)
    compare("the reward", got["rewards"], rewards, {})


def no_reward_model(dpo_loss):
    """No reward model.

    Every policy is the best one for some reward under a KL penalty, r = beta log(pi / ref). DPO
    puts this r into the reward model's loss. Write it for log-probabilities of whole responses.

    Predict: what is the loss before the first step, where policy and reference are the same?

    Answer: log 2, whatever the preferences are. It falls when the margin grows, also where both
    answers become less likely, so long as the rejected one loses more.

    Hint: four log-probabilities become two rewards, and these one margin.

    Hint: beta stands inside the sigmoid: it is how far a preference of a given strength leads.

    Run: python -m experiments.train_dpo --out_dir out/dpo
    """
    torch.manual_seed(0)
    a, b, ref_a, ref_b = torch.randn(4, 5)
    loss = lambda margin: -F.logsigmoid(margin).mean()
    margin = (a - ref_a) - (b - ref_b)
    mistakes = {
        "the reference is missing: it forgets where it started": loss(0.3 * (a - b)),
        "chosen and rejected are swapped": loss(-0.3 * margin),
        "beta is outside the sigmoid, where it only scales the learning rate": 0.3 * loss(margin),
        "beta is missing": loss(margin),
        "the logarithm is missing: this is a probability": -torch.sigmoid(0.3 * margin).mean(),
        "a sum, no mean": loss(0.3 * margin) * 5,
    }
    compare("the loss", dpo_loss(a, b, ref_a, ref_b, 0.3), loss(0.3 * margin), mistakes)
    must(dpo_loss(a * 400, b, ref_a, ref_b, 9.0).isfinite(), "log(sigmoid(x)) is -inf: logsigmoid")


def one_of_k(pass_at_k):
    """One of k.

    A verifier says right or wrong. From n samples, c of them right, estimate how likely it is that
    one of k is right. On average over c it must be exactly 1 - (1 - p)^k.

    Predict: n = 10, c = 1. Is 1 - (1 - c/n)^5 too high or too low on average?

    Answer: too low. (1 - x)^k curves upwards, so its mean over noisy x is above its value at the
    mean. The unbiased estimate for these numbers is 0.5, the biased one 0.41.

    Hint: of all ways to draw k of the n samples, count those without a right one.

    Hint: `comb(n - c, k)` is 0 by itself where fewer than k samples are wrong.

    Run: python -m experiments.train_rft --out_dir out/rft
    """
    for n, k, p in ((5, 1, 0.3), (6, 3, 0.2), (10, 5, 0.1)):
        chance = [comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
        mean = lambda estimate: sum(q * estimate(n, c, k) for c, q in enumerate(chance))
        mistakes = {
            "this is 1 - (1 - c/n)^k: right on no average, it is biased to be too low": (
                mean(lambda n, c, k: 1 - (1 - c / n) ** k)
            ),
            "this is the chance that all k are right": mean(
                lambda n, c, k: comb(c, k) / comb(n, k)
            ),
            "this is the chance that none is right": (1 - p) ** k,
            "this is pass@1": p,
        }
        compare(f"the mean, n={n} k={k} p={p},", mean(pass_at_k), 1 - (1 - p) ** k, mistakes)


def beat_the_bar(estimate):
    """Capstone: your own estimator.

    experiments/small_world.py is a world of 31 sentences, where all that PPO maximises is a sum. An
    estimator turns scores into advantages, and `climb(estimate)` trains a policy with it: 30
    iterations, no value function. The optimum is J = 0.3036. PPO's own estimator comes to 0.2997
    there (lambda 0.95 without values). Come to 0.3010.

    Predict: which matters more in this world: the baseline, or credit for each single token?

    Answer: the baseline. The sum of a response's rewards minus the batch's mean comes to 0.3031;
    without the mean to 0.3002; with whitened rewards-to-go in place of the sum, to 0.2991.

    Hint: without the KL in the rewards J falls below where it began: it is a part of J.

    Hint: one prompt is asked in this world, so the whole batch is one group.

    Run: python -m experiments.small_world
    """
    world = importlib.import_module("experiments.small_world")
    path = world.climb(estimate, critic="none", max_steps=30)
    first, last = world.objective(path, path[0])[[0, -1]].tolist()
    must(last == last, "J is nan: something divides by 0")
    must(last > first - 1, f"J falls from {first:.4f} to {last:.4f}: the sign of the advantages?")
    must(last > first, f"J falls from {first:.4f} to {last:.4f}: is the KL penalty in the rewards?")
    must(last >= 0.3010, f"J comes to {last:.4f}, and not to 0.3010")


EXERCISES = [
    Exercise("7.1", leave_one_out, rloo),
    Exercise("7.2", no_reward_model, dpo_loss),
    Exercise("7.3", one_of_k, pass_at_k),
    Exercise("7.4", beat_the_bar, estimate),
]
