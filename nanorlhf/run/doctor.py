"""What is wrong with a run, read from its metrics and said in plain words.

A rule compares medians and means over several rows, never single rows, and waits until a run is
long enough to tell. Thresholds lie well away from what healthy runs show: a finding is rarely
wrong, and silence proves nothing. They were set on seeds 11 and 12 of the embedded world, on the
docs' runs on film reviews and HH-RLHF, and on runs made sick on purpose.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from statistics import fmean, median, stdev
from textwrap import wrap

RECENT = 5  # rows that "now" is the median of

ADVICE = {  # name: (what it means, what to try)
    "KL running away": (
        "The policy has left the SFT model so far behind that the reward model judges text unlike"
        " any it was trained on: high scores mean little there.",
        "a higher --kl_coef or --adaptive_kl, a lower --learning_rate, fewer --max_steps",
    ),
    "KL stuck at 0": (
        "The policy still is the SFT model, and scores do not rise: updates are too small, or the"
        " penalty outweighs every difference of score.",
        "a higher --learning_rate, a lower --kl_coef or --kl_loss_coef, more --ppo_epochs",
    ),
    "sampling and scoring differ": (
        "The sampled kl departs from kl_exact in one direction (shown: the mean difference): tokens"
        " are not drawn from the distribution that scores them. A batch's k1 estimate may be a"
        " little negative, its mean over rows may not.",
        "no top-k or top-p in rollouts, one --temperature in sampling and log-probs, no dropout",
    ),
    "entropy collapse": (
        "The policy is nearly certain of each next token: samples are alike, text repeats itself.",
        "a higher --kl_coef, --entropy_coef 0.01, a lower --learning_rate, fewer --ppo_epochs",
    ),
    "updates too large": (
        "Within one iteration the policy moves far from the one that sampled: much of what it"
        " wants is clipped, and the rest goes by stale samples.",
        "a lower --learning_rate, fewer --ppo_epochs, a larger --minibatch_size, --max_approx_kl",
    ),
    "clipfrac stuck at 0": (
        "No token comes near the clipping range: the updates hardly change the policy.",
        "a higher --learning_rate, more --ppo_epochs, a smaller --minibatch_size",
    ),
    "values explain nothing": (
        "The value function predicts returns no better than a constant, or far worse: it takes no"
        " noise out of the advantages, or adds some.",
        "--critic separate, a higher --vf_coef, a larger --cliprange_value if vf_clipfrac is high",
    ),
    "eos rate falling": (
        "Fewer responses end by themselves; the others are cut at --max_new_tokens and get"
        " --missing_eos_score, whatever they say.",
        "a --missing_eos_score below all usual scores, a higher --kl_coef, more --max_new_tokens",
    ),
    "length drifting": (
        "Responses are far longer or shorter than the SFT model's: often a reward model's taste"
        " for length, and nothing else, is what PPO finds.",
        "read samples; a higher --kl_coef; reward-model --data where good texts have all lengths",
    ),
    "reward up, audit down": (
        "Scores rise while the audit, which nothing is trained on, falls: the policy exploits"
        " mistakes of the reward model.",
        "a higher --kl_coef or --adaptive_kl, fewer --max_steps, new feedback on these samples",
    ),
    "advantage scale off": (
        "Before whitening advantages are far larger than --cliprange_value is meant for: values"
        " cannot follow, and their loss drowns the policy's. If scores_sd is large as well,"
        " --kl_coef (reward per nat) is as good as absent; if not, the penalty outweighs scores.",
        "a --reward function divided by its sd over samples, --whiten_rewards, a lower --vf_coef",
    ),
    "scores all alike": (
        "Every response gets the same score: there is nothing to learn but whitened noise.",
        "a --reward that tells responses apart; print what it returns for a few of them",
    ),
    "reward flat": (
        "Scores are where they began, or lower, although the policy has moved.",
        "what other findings say; else a larger --batch_size, another --learning_rate",
    ),
    "reward model at chance": (
        "On held-out prompts it orders pairs as a coin would: the labels carry no signal, or the"
        " model does not see it.",
        "python -m nanorlhf data FILE (are better and worse mixed up?), another --learning_rate,"
        " an --init that went through SFT, more --data",
    ),
    "train/validation gap": (
        "Held-out loss rises while training loss falls: examples are learned by heart. The next"
        " stage takes the checkpoint with the lowest val_loss, so later steps are wasted.",
        "fewer --max_steps or --epochs, more --data, --dropout 0.1 (GPT, SFT)",
    ),
    "loss not falling": (
        "Held-out loss is no lower than at the start, or far above its best, and training loss"
        " with it: training diverges, or does nothing.",
        "a --learning_rate ten times lower, more --warmup_steps; if grad_norm is tiny, a higher",
    ),
    "non-finite value": (
        "A metric is inf or nan: something overflowed or was divided by nothing.",
        "--dtype float32, a lower --learning_rate, a look at what --reward or --gold returns",
    ),
}


@dataclass
class Finding:
    name: str
    metric: str
    value: float
    step: int

    def __str__(self):
        means, to_try = ADVICE[self.name]
        about = f"{self.name}: {self.metric} {self.value:.3g} at step {self.step}"
        return "\n  ".join([about, *wrap(means, 94), *wrap(f"Try: {to_try}", 94)])


class Doctor:
    """Reads the rows of a run, from a file or while it trains, and makes each finding once, as soon
    as it is clear."""

    def __init__(self, flags, max_steps):
        self.flags, self.max_steps = flags, max_steps
        self.columns = defaultdict(list)  # metric -> its finite values so far
        self.said = set()  # names of findings

    def read(self, row):
        """Take in a row of metrics, {name: float} without blank cells; returns the new Findings."""
        signs = []  # (name of a finding, metric, value)
        for metric, value in row.items():
            if math.isfinite(value):
                self.columns[metric].append(value)
            elif metric != "explained_variance" or math.isinf(value):  # nan: nothing to explain
                signs.append(("non-finite value", metric, value))
        m = self.columns
        done = row["step"] / max(self.max_steps, 1)  # share of the run
        if "val_loss" in row:
            signs += of_losses(m, done)
        if "kl" in row:
            signs += [*of_the_policy(m, done, self.flags), *of_the_update(m, done, self.flags)]
            signs += [*of_the_text(m), *of_the_reward(m, done)]
        new = {name: (metric, value) for name, metric, value in signs if name not in self.said}
        self.said |= set(new)
        return [
            Finding(name, metric, value, int(row["step"])) for name, (metric, value) in new.items()
        ]


# In what follows m is {metric: values so far}, and `done` the share of the run that is over. Of too
# few values the median is nan, and every comparison with nan is False: no finding


def now(values):
    return median(values[-RECENT:]) if len(values) >= RECENT else math.nan


def at_first(values):
    return median(values[:3]) if len(values) >= 2 * RECENT else math.nan


def noise(values):
    """The sd of a value around its trend, from the differences between neighbours. Of normal noise
    with sd 1 these have sd sqrt(2), so their median size is 0.954, and 1.05 is its inverse."""
    differences = [abs(a - b) for a, b in zip(values, values[1:])]
    return 1.05 * median(differences) if differences else math.nan


def of_losses(m, done):
    """Stages 1 to 3. A finding needs two evaluations in a row that agree, on 50 held-out judgements
    or loss tokens."""
    losses, accuracies = m["val_loss"], m["val_accuracy"]
    if len(losses) < 3 or done < 0.5 or min(m["val_weight"], default=math.inf) < 50:
        return
    lately, best = min(losses[-2:]), min(losses)
    if lately > 1.03 * best and now(m["loss"]) < 0.9 * min(lately, losses[0]):
        yield "train/validation gap", "val_loss", losses[-1]
    elif lately > 1.1 * best or lately >= losses[0]:
        yield "loss not falling", "val_loss", losses[-1]
    if accuracies and max(accuracies[-2:]) < 0.54:
        yield "reward model at chance", "val_accuracy", accuracies[-1]


def of_the_policy(m, done, flags):
    """How far the policy has gone from the SFT model, and how certain it has become."""
    kl, exact = now(m["kl"]), now(m["kl_exact"])
    expected = 2 * flags.get("kl_target", 0) if flags.get("adaptive_kl") else 0
    if kl > max(20, expected, 0.5 * now(m["length"])):
        yield "KL running away", "kl", kl
    differences = [a - b for a, b in zip(m["kl"], m["kl_exact"])][-4 * RECENT :]
    if len(differences) >= 2 * RECENT:
        off, error = fmean(differences), stdev(differences) / len(differences) ** 0.5
        if abs(off) > max(6 * error, 0.1 + 0.1 * exact):
            yield "sampling and scoring differ", "kl - kl_exact", off
    if now(m["entropy"]) < 0.5 * at_first(m["entropy"]):
        yield "entropy collapse", "entropy", now(m["entropy"])


def of_the_update(m, done, flags):
    clipfrac, explained, rate = m["clipfrac"], m["explained_variance"], m["learning_rate"]
    for metric, limit in (("clipfrac", 0.2), ("approx_kl", 0.05)):
        if now(m[metric]) > limit:
            yield "updates too large", metric, now(m[metric])
    n_rows = flags.get("batch_size", 0) * flags.get("rollouts_per_prompt", 1)
    # one optimizer step per rollout starts at ratio 1, where nothing can be clipped
    one_step = flags.get("ppo_epochs") == 1 and flags.get("minibatch_size", 0) >= n_rows
    decayed = now(rate) < 0.5 * max(rate, default=0)
    if len(clipfrac) > RECENT and max(clipfrac) < 1e-5 and not (one_step or decayed):
        yield "clipfrac stuck at 0", "clipfrac", now(clipfrac)
    long_enough = done > 0.5 and len(explained) >= 2 * RECENT
    is_flat = now(m["scores_sd"]) < 1e-3  # then there is nothing to explain
    if not is_flat and (now(explained) < -1 or long_enough and max(explained) < 0.02):
        yield "values explain nothing", "explained_variance", now(explained)


def of_the_text(m):
    eos_rate, eos_rate_before = now(m["eos_rate"]), at_first(m["eos_rate"])
    if eos_rate < eos_rate_before - 0.15 or eos_rate < min(eos_rate_before + 0.1, 0.5):
        yield "eos rate falling", "eos_rate", eos_rate
    length, length_before = now(m["length"]), at_first(m["length"])
    if length > 1.8 * length_before or length < 0.5 * length_before:
        yield "length drifting", "length", length


def of_the_reward(m, done):
    scores, gold = m["scores"], m["gold"]
    if now(m["scores_sd"]) < 1e-3:
        yield "scores all alike", "scores_sd", now(m["scores_sd"])
    if m["explained_variance"] and now(m["advantages_sd"]) > 5:  # absent with --critic none
        yield "advantage scale off", "advantages_sd", now(m["advantages_sd"])
    risen = now(scores) - at_first(scores)
    error = noise(scores) * (1 / RECENT + 1 / 3) ** 0.5  # standard error of that, were it of means
    if done > 0.5 and risen < 2 * error:
        exact = now(m["kl_exact"])
        if exact < 0.5:
            yield "KL stuck at 0", "kl_exact", exact
        else:
            yield "reward flat", "scores", now(scores)
    if len(gold) == len(scores) >= 2 * RECENT:
        windows = range(RECENT, len(gold) + 1)  # each by its end
        audit = [now(gold[:end]) for end in windows]
        best_end = windows[audit.index(max(audit))]
        fallen = max(audit) - audit[-1]
        risen_since = now(scores) - now(scores[:best_end])
        errors = 4 * (2 / RECENT) ** 0.5  # four standard errors of the difference of two windows
        if fallen > errors * noise(gold) and risen_since > errors * noise(scores):
            yield "reward up, audit down", "gold", audit[-1]
