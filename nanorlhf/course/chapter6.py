"""Chapter 6, a judge that is fooled: distance, when to stop, and what length buys.

Shapes: B responses.
"""

import csv
import math
from itertools import groupby

import torch

from nanorlhf.course.exercises import Exercise, compare, must, near
from nanorlhf.machine.python_file import ROOT


def best_of_n_kl(n):
    """KL, in nats, from a policy to the best of n that it says, where all texts have different
    scores and none is likely. arXiv:2009.01325, appendix G.3."""
    return math.log(n) - (n - 1) / n


def stop(kl, proxy):
    """The index of the row at which to stop a run of PPO. Two lists, a number for each evaluation:
    KL from the SFT model in nats, and the reward model's score. Gold is not asked."""
    return max(i for i, x in enumerate(kl) if x <= 6)


def without_length(scores, lengths):
    """Scores (B,) less what a straight line through (length, score) says: the residual of least
    squares, plus the mean score. Where all lengths are equal, the scores as they are."""
    x = (lengths - lengths.mean()).to(scores.dtype)
    slope = (x * (scores - scores.mean())).sum() / (x * x).sum().clamp(min=1e-8)
    return scores - slope * x


def best_of_n(best_of_n_kl):
    """How far is the best of n?

    Sample n answers and keep the one with the best score: no training, and still another policy.
    Its KL from the model that samples has a closed form. Each of M equally likely texts has a score
    of its own; find the probability of being the best of n, and let M grow.

    Predict: the KL of the best of 64. PPO runs of this project end at 4 nats or so.

    Answer: log 64 - 63/64 = 3.17 nats. To get as far as 4 nats takes n = 148.

    Hint: the text at quantile u has density n * u^(n-1) in place of 1.

    Hint: the mean of log(n * u^(n-1)) under that density; the mean of log u there is -1/n.

    Run: python -m experiments.overoptimization --quick
    """
    u = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    for n in (1, 2, 16, 64):
        p = (u**n).diff()
        kl = float(torch.special.xlogy(p, p * len(p)).sum())
        mistakes = {
            "log n counts texts; the second best of n are no worse than before": math.log(n),
            "(n - 1) is not divided by n": math.log(n) - (n - 1),
            "this is the other direction, KL(policy || best of n)": (n - 1) - math.log(n),
            "nats, and not bits": kl / math.log(2),
        }
        got = best_of_n_kl(n)
        if not math.isclose(got, kl, abs_tol=1e-3):
            compare(f"the KL of the best of {n}", got, kl, mistakes)


def stopped_in_time(stop):
    """Stop in time, without gold.

    docs/results/overoptimization.csv has 45 runs of PPO. You see KL and the reward model's score at
    each evaluation. Say where to stop. Then the gold score is opened: of the best that each run had
    you may lose 0.2 on average.

    Predict: how much is lost by stopping where the reward model's score is highest?

    Answer: 1.07 on average, as much as by never starting (1.12) and by never stopping (1.07). The
    score that is optimised cannot say when it stopped being true; the distance can.

    Hint: plot gold against KL for a few of the runs: where do the tops lie?

    Hint: one bound on KL for all runs is enough.

    Run: python -m nanorlhf doctor out/ppo
    """
    with open(ROOT / "docs/results/overoptimization.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["by"] != "best of n"]
    of_run, runs = lambda row: (row["seed"], row["feedback"], row["by"]), []
    for _, run in groupby(sorted(rows, key=of_run), of_run):
        run = sorted(run, key=lambda row: int(row["step"]))
        runs.append([[float(row[name]) for row in run] for name in ("kl", "proxy", "gold")])
    stops = [stop(list(kl), list(proxy)) for kl, proxy, _ in runs]
    lost = [max(gold) - gold[i] for i, (*_, gold) in zip(stops, runs)]
    mean = sum(lost) / len(lost)
    must(any(stops), f"you never start: {mean:.2f} lost on average")
    is_end = all(i in (-1, len(run[0]) - 1) for i, run in zip(stops, runs))
    must(not is_end, f"you never stop: {mean:.2f} lost on average, {max(lost):.1f} at worst")
    is_top = all(proxy[i] == max(proxy) for i, (_, proxy, _) in zip(stops, runs))
    must(not is_top, f"you believe the judge that is being fooled: {mean:.2f} lost on average")
    must(mean <= 0.2, f"{mean:.2f} of gold is lost on average, {max(lost):.1f} at worst, not 0.2")


def not_fooled_by_length(without_length):
    """A reward that length cannot fool.

    People who compare answers like long ones a little better, whatever they say, and a reward model
    learns that first. Take out of a batch's scores what a straight line in length explains.

    Predict: all good answers of a batch are long. What does your reward do to them?

    Answer: it takes their merit for length, and takes it away. From one batch nobody can tell the
    two apart: it needs good answers that are short.

    Hint: the slope is the covariance of length and score over the variance of length.

    Hint: take out slope * (length - mean length): so the mean score stays.

    Run: python -m nanorlhf plot --runs out/ppo --columns eval_scores eval_gold eval_length
    """
    torch.manual_seed(0)
    merit, lengths = torch.randn(64), torch.randint(5, 90, (64,)).float()
    scores = merit + 0.1 * lengths
    got = without_length(scores, lengths)
    must(got.shape == scores.shape, "one reward for each response")
    x = lengths - lengths.mean()
    leans = float((x * (got - got.mean())).sum() / (x * x).sum())
    must(leans > -0.05, f"short answers win now: {leans:.3f} for each token")
    must(abs(leans) < 1e-3, f"length still pays: {leans:.3f} for each token")
    must(
        near(got.mean(), scores.mean()),
        "the mean score is to stay: --missing_eos_score is absolute",
    )
    kept = float(torch.corrcoef(torch.stack([got, merit]))[0, 1])
    must(kept > 0.9, f"the merit is gone too: its correlation with the reward is {kept:.2f}")
    same = without_length(merit, torch.full((64,), 7.0))
    must(near(same, merit), "all lengths are equal: there is nothing to take out (0 / 0?)")


EXERCISES = [
    Exercise("6.1", best_of_n, best_of_n_kl),
    Exercise("6.2", stopped_in_time, stop),
    Exercise("6.3", not_fooled_by_length, without_length),
]
