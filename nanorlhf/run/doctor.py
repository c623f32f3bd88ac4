"""What is wrong with a run, read from its metrics and said in plain words.

A rule compares medians and means over several rows, never single rows, and waits until a run is
long enough to tell. Thresholds lie well away from what healthy runs show: a finding is rarely
wrong, and silence proves nothing. They were set on seeds 11 and 12 of the embedded world, on the
docs' runs on film reviews and HH-RLHF, and on runs made sick on purpose.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from textwrap import indent

MAY_BE_NAN = ("explained_variance", "score_", "eval_score_")
RECENT = 5  # rows that "now" is the median of

# advice.txt: the name of a finding, what it means; in a second line what to try
TEXTS = Path(__file__).with_name("advice.txt").read_text().strip().split("\n\n")
ADVICE = dict(text.split(": ", 1) for text in TEXTS)


@dataclass
class Finding:
    name: str
    metric: str
    value: float
    step: int

    def __str__(self):
        first = f"{self.name}: {self.metric} {self.value:.3g} at step {self.step}"
        return f"{first}\n{indent(ADVICE[self.name], '  ')}"


class Doctor:
    """Reads the rows of a run, from a file or while it trains, and makes each finding once, as soon
    as it is clear."""

    def __init__(self, flags, max_steps):
        self.flags, self.max_steps = flags, max_steps
        self.columns = defaultdict(list)  # metric -> its finite values so far
        self.names = set()  # of the findings so far

    def read(self, row):
        """Take in a row of metrics, {name: float} without blank cells; returns the new Findings."""
        rules = []
        for metric, value in row.items():
            if math.isfinite(value):
                self.columns[metric].append(value)
            # nan: there is nothing to explain, or that a judge judges
            elif not metric.startswith(MAY_BE_NAN) or math.isinf(value):
                rules.append(("non-finite value", metric, value, True))
        done = row["step"] / max(self.max_steps, 1)  # share of the run
        if "val_loss" in row:
            rules += of_losses(self.columns, done)
        for rules_of in (of_the_policy, of_the_update, of_the_reward) if "kl" in row else ():
            rules += rules_of(self.columns, done, self.flags)
        findings = []
        for name, metric, value, holds in rules:
            if holds and name not in self.names:
                self.names.add(name)
                findings.append(Finding(name, metric, value, int(row["step"])))
        return findings


# ---- rules: (finding, metric, its value, whether it holds) -------------------------------------

# m is {metric: values so far}, `done` the share of the run that is over. Of too few values the
# median is nan, and every comparison with nan is False: no finding


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
    losses, accuracies = m["val_loss"], m["val_accuracy"] or [1.0]
    if len(losses) < 3 or done < 0.5 or min(m["val_weight"], default=math.inf) < 50:
        return
    lately, best = min(losses[-2:]), min(losses)
    gap = lately > 1.03 * best and now(m["loss"]) < 0.9 * min(lately, losses[0])
    yield "train/validation gap", "val_loss", losses[-1], gap
    worse = lately > 1.1 * best or lately >= losses[0]
    yield "loss not falling", "val_loss", losses[-1], worse and not gap
    yield "reward model at chance", "val_accuracy", accuracies[-1], max(accuracies[-2:]) < 0.54


def of_the_policy(m, done, flags):
    """How far it has gone from the SFT model, how certain it has become, and what it writes."""
    kl, exact, entropy, length = (now(m[x]) for x in ("kl", "kl_exact", "entropy", "length"))
    yield "KL running away", "kl", kl, kl > max(20, 2 * flags.get("kl_target", 0), 0.5 * length)
    differences = [a - b for a, b in zip(m["kl"], m["kl_exact"])][-4 * RECENT :]
    if len(differences) >= 2 * RECENT:
        off, error = fmean(differences), stdev(differences) / len(differences) ** 0.5
        differ = abs(off) > max(6 * error, 0.1 + 0.1 * exact)
        yield "sampling and scoring differ", "kl - kl_exact", off, differ
    yield "entropy collapse", "entropy", entropy, entropy < 0.5 * at_first(m["entropy"])
    eos_rate, before = now(m["eos_rate"]), at_first(m["eos_rate"])
    fallen = eos_rate < before - 0.15 or eos_rate < min(before + 0.1, 0.5)
    yield "eos rate falling", "eos_rate", eos_rate, fallen
    before = at_first(m["length"])
    drifted = length > 1.8 * before or length < 0.5 * before
    yield "length drifting", "length", length, drifted


def is_one_step(flags):
    """Whether a rollout gets one optimizer step: its ratio is 1, and nothing can be clipped."""
    n_rows = flags.get("batch_size", 0) * flags.get("rollouts_per_prompt", 1)
    return flags.get("ppo_epochs") == 1 and flags.get("minibatch_size", 0) >= n_rows


def of_the_update(m, done, flags):
    clipfrac, explained, rate = m["clipfrac"], m["explained_variance"], m["learning_rate"]
    for metric, limit in (("clipfrac", 0.2), ("approx_kl", 0.05)):
        yield "updates too large", metric, now(m[metric]), now(m[metric]) > limit
    if not is_one_step(flags):
        # exactly 0, although the policy has moved; of a rate that is too low a little is left
        same = max(m["approx_kl"], default=1) == 0 and now(m["kl_exact"]) > 0.01
        yield "ratio always 1", "approx_kl", 0.0, same
        decayed = now(rate) < 0.5 * max(rate, default=0)
        stuck = len(clipfrac) > RECENT and max(clipfrac) < 1e-5 and not (same or decayed)
        yield "clipfrac stuck at 0", "clipfrac", now(clipfrac), stuck
    useless = done > 0.5 and len(explained) >= 2 * RECENT and max(explained) < 0.02
    useless = (useless or now(explained) < -1) and not now(m["scores_sd"]) < 1e-3
    yield "values explain nothing", "explained_variance", now(explained), useless


def of_the_reward(m, done, flags):
    scores, gold, exact, spread = m["scores"], m["gold"], now(m["kl_exact"]), now(m["scores_sd"])
    # rewards are scores and penalties; that of the loss is in ours and not in GRPO's. A fork may
    # have others, but hardly so many times the scores
    columns = zip(m["rewards"], scores, m["kl_coef"], m["kl"])
    gap = now([total - score + coef * kl for total, score, coef, kl in columns])
    off = min(abs(gap), abs(gap + flags.get("kl_loss_coef", 0) * exact))
    usual = 0.5 * now(m["length"]) * abs(now(scores)) + spread + 0.01 * abs(now(m["rewards"]))
    yield "score at every token", "rewards", now(m["rewards"]), off > usual
    yield "scores all alike", "scores_sd", spread, spread < 1e-3
    if m["explained_variance"]:  # absent with --critic none
        scale = now(m["advantages_sd"])
        yield "advantage scale off", "advantages_sd", scale, scale > 5
    # standard error of a difference of medians of 5 and 3 rows, were they means
    error = noise(scores) * (1 / RECENT + 1 / 3) ** 0.5
    flat = done > 0.5 and now(scores) - at_first(scores) < 2 * error
    yield "KL stuck at 0", "kl_exact", exact, flat and exact < 0.5
    yield "reward flat", "scores", now(scores), flat and not exact < 0.5
    if len(gold) == len(scores) >= 2 * RECENT:
        ends = range(RECENT, len(gold) + 1)  # of windows of RECENT rows
        best = max(ends, key=lambda end: now(gold[:end]))
        fallen, risen = now(gold[:best]) - now(gold), now(scores) - now(scores[:best])
        errors = 4 * (2 / RECENT) ** 0.5  # four standard errors of the difference of two windows
        hacked = fallen > errors * noise(gold) and risen > errors * noise(scores)
        yield "reward up, audit down", "gold", now(gold), hacked
