"""Chapter 5, the update: advantages and PPO's loss.

Shapes: B responses, T tokens.
"""

import torch

from nanorlhf import functional as f
from nanorlhf.course.exercises import Exercise, compare, must, near
from nanorlhf.model import GPT, ActorCritic, GPTConfig, RewardModel


def advantages_by_hand(gae):
    """GAE by hand.

    The advantage of a token says how much better things went than the value function had expected.
    Write the recursion. It runs from the last token to the first, and starts at 0.

    Predict: all values are 0, gamma is 1, and the only reward is the score at the last token. Which
    tokens hear of it with lam=0, which with lam=0.95, which with lam=1?

    Answer: with 0 the last one alone: A_t is r_t + V_{t+1} - V_t, and these values know nothing.
    With 0.95 all of them, each 0.95 times as much as the one behind it. With 1 all alike: the
    deltas telescope, and A_t is the sum of the rewards from t on, minus V_t.

    Hint: keep two tensors (B,) while you go backwards: the next value, and the next advantage.

    Hint: set rewards and values to 0 outside the mask first; then padding needs no further care.

    Run: python -m nanorlhf inspect    (the value and the advantage of each token of a rollout)
    """
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 2, 4)
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    gamma, lam, later = 0.9, 0.5, values.roll(-1, 1)
    right = f.gae(rewards, values, mask, gamma, lam)
    got = gae(rewards.clone(), values.clone(), mask, gamma, lam)
    must(isinstance(got, tuple) and len(got) == 2, "two results: advantages, returns")
    dirty = [x.masked_fill(~mask, 9.0) for x in (rewards, values)]
    leak = "padding leaks in: what stands behind the last token must count as 0"
    must(near(gae(*dirty, mask, gamma, lam)[0][mask], got[0][mask]), leak)
    deltas = rewards.masked_fill(~mask, 0) - values.masked_fill(~mask, 0)
    mistakes = {
        "lambda is missing: the trace decays by gamma * lam": (
            f.gae(rewards, values, mask, gamma, 1.0)[0]
        ),
        "gamma is missing": f.gae(rewards, values, mask, 1.0, lam)[0],
        "the value is one token late: V_{t+1} stands where V_t belongs": (
            f.gae(rewards, later.masked_fill(~mask.roll(-1, 1), 0), mask, gamma, lam)[0]
        ),
        "the next value is missing: each token is charged for all that comes later": (
            f.gae(deltas, 0 * values, mask, gamma, lam)[0]
        ),
    }
    compare("the advantage", got[0], right[0], mistakes)
    mistakes = {
        "returns are advantages + values, the target of the value function": right[0],
        "this target is V - A: the value function would run away from it": values - right[0],
    }
    compare("the return", got[1], right[1], mistakes)


def whitened(masked_whiten):
    """Whitening, over the mask alone.

    Advantages are shifted to mean 0 and scaled to sd 1, so that one learning rate fits all rewards.
    Half of a batch may be padding.

    Predict: what happens to the advantages of short responses if the padding's zeros count too?

    Answer: the mean moves to 0 and the sd shrinks, so all are scaled up: the more padding there is,
    the larger is the step. That depends on the longest response, which has nothing to do with it.

    Hint: `masked_mean` is at hand, for the mean and for the variance.

    Hint: `torch.rsqrt(variance + 1e-8)`; and 0 outside the mask at the end, by masked_fill.

    Run: python -m pytest tests/test_functional.py -k whiten
    """
    x, mask = torch.tensor([[1.0, 2.0, 6.0, 0.0]]), torch.tensor([[True, True, True, False]])
    part, got = x[mask], masked_whiten(x, mask)
    right, sd = (part - part.mean()) / part.std(correction=0), part.std(correction=0)
    mistakes = {
        "advantages are whitened over padding too": f.masked_whiten(x, mask | True)[mask],
        "padding counts too, and variance is divided by n - 1": ((x - x.mean()) / x.std())[mask],
        "the variance is divided by n - 1; with one token that is 0 / 0": right * sd / part.std(),
        "divided by the variance: its square root is missing": right / sd,
        "the mean is still there": part / sd,
    }
    compare("the result", got[mask], right, mistakes)
    must(near(got[~mask], [0.0]), "what stands outside the mask is to be 0")
    kept = masked_whiten(x, mask, shift_mean=False)
    must(near(kept[mask].mean(), part.mean()), "shift_mean=False: the mean is to stay as it was")
    poisoned = masked_whiten(torch.where(mask, x, torch.inf), mask)
    must(near(poisoned, got), "inf * 0 is nan: masked_fill, and not x * mask")


def gradient_by_cases(policy_loss):
    """Where PPO stops pushing.

    Fill in `unclipped`, `clipped` and `loss`. The check looks at the gradient of one token: its
    advantage is positive or negative, its ratio is 0.5, 1 or 1.5, and cliprange is 0.2.

    Predict: in which of the six cases is the gradient 0?

    Answer: in two: A > 0 at ratio 1.5, and A < 0 at ratio 0.5. There the policy has already moved
    far in the direction that it is pushed to. Where it has moved the wrong way, nothing is clipped.

    Hint: the loss is minimised, and so each term has a minus; then the worse one is the maximum.

    Hint: `ratio.clamp(1 - cliprange, 1 + cliprange)`, and the mean through `masked_mean`.

    Run: python train_ppo.py --ppo_epochs 8 --out_dir out/epochs    (see clipfrac and approx_kl)
    """
    one, yes, stops = torch.ones(1, 1), torch.tensor([[True]]), {(1, 1.5), (-1, 0.5)}
    for A in (1, -1):
        for ratio in (1.0, 1.5, 0.5):
            new = (ratio * one).log().requires_grad_()
            policy_loss(new, 0 * one, A * one, yes, 0.2)[0].backward()
            slope, case = float(new.grad), f"with A = {A} at ratio {ratio}"
            must(slope * A <= 0, f"{case} the likelihood moves against the advantage: a sign")
            if (A, ratio) in stops:
                must(slope == 0, f"{case} there is still a gradient: min where max belongs?")
                continue
            must(slope != 0, f"{case} there is no gradient: nothing leads back (clipped alone?)")
            must(near(slope, -A * ratio), f"{case} the slope is {slope:.3f}, not {-A * ratio}")
    new, mask = torch.tensor([[0.1, -0.1, 5.0]]), torch.tensor([[True, True, False]])
    loss, _ = policy_loss(new, 0 * new, torch.tensor([[2.0, -1.0, 9.0]]), mask, 0.2)
    right = (-2 * new[0, 0].exp() + new[0, 1].exp()) / 2
    mistakes = {"the mean is over padding too": (right * 2 - 9) / 3, "a sum, no mean": right * 2}
    compare("the loss", loss, right, mistakes)


def hunt_for_a_late_value(forward):
    """Hunt: a value that knows too much.

    The value function explains its returns much too well, and the policy learns little. A value is
    what is expected before a token is said. Find the mistake.

    Predict: what does a value that has seen the token do to the advantage of that token?

    Answer: it takes away what the token itself was worth: what is left says little about whether to
    say it again. Explained variance looks better than that of the healthy run.

    Hint: `rows["states"]` are the positions from which the response tokens were sampled.

    Hint: logits and values belong to the same position, so both can be read from the same states.

    Run: python train_ppo.py --mistake late_values --out_dir out/late    (see explained_variance)
    """
    torch.manual_seed(0)
    sizes = GPTConfig(7, block_size=8, n_layer=1, n_head=1, d_model=8)
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6]])  # two of the prompt, four of the response
    rows = {"tokens": tokens, "states": torch.tensor([[1, 2, 3, 4]])}
    for critic in ("shared", RewardModel(GPT(sizes))):
        policy = ActorCritic(GPT(sizes), critic).eval()
        if critic == "shared":
            torch.nn.init.normal_(policy.value_head.weight)
        logits, values = forward(policy, rows)
        for t in range(4):
            other = tokens.clone()
            other[0, 2 + t] = 0  # the token said at t
            moved = (forward(policy, rows | {"tokens": other})[1] - values)[0].abs() > 1e-6
            must(not moved[t], f"the value before token {t} has read that token: it is one late")
            must(t == 3 or moved[t + 1], f"the value after token {t} does not know it: one early")
        must(near(logits, policy.gpt.head(policy.gpt.in_states(rows))), "the logits were right")


LOSS = r"unclipped = .*?, response_mask\)"
VALUES = r"(?<=scalar\(self\.value_head, )hidden"
LATE = 'at(self.gpt.hidden(rows["tokens"]), rows["states"] + 1)'
EXERCISES = [
    Exercise("5.1", advantages_by_hand, f.gae),
    Exercise("5.2", whitened, f.masked_whiten),
    Exercise("5.3", gradient_by_cases, f.policy_loss, LOSS),
    Exercise("5.4", hunt_for_a_late_value, ActorCritic.forward, VALUES, LATE),
]
