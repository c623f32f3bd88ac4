"""When should PPO have stopped? In real data nobody knows gold, but KL and score are known. How
much gold does a rule lose that goes by them, beside the best checkpoint of a run?

    python -m experiments.when_to_stop     # seconds: it reads stored curves and trains nothing

A rule keeps the last checkpoint before KL or the iterations pass a limit, or else the one with the
highest score - price * KL. PPO maximises that, with --kl_coef for the price; here it is asked for
afterwards, of what was measured on held-out prompts. Stories are PPO runs of overoptimization.py,
letters are those of two_judges.py with a reward model, verifier its other ones.

What is stored of a checkpoint are means over held-out prompts. So the best checkpoint is chosen and
valued on the same prompts: it is a lucky one, and all rules seem to lose more than they do.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.lab import interval
from experiments.two_judges import line
from nanorlhf import picture
from nanorlhf.config import arg, die, from_cli, reason

RULES = {  # what is watched, and its limits; log 4, 16, 64 and 256 are 1.39, 2.77, 4.16 and 5.55
    "last checkpoint": ("step", [np.inf]),
    "highest score": ("price", [0.0]),
    "limit of iterations": ("step", [4, 8, 12, 16, 24]),
    "limit of KL, nats": ("kl", [1, 1.39, 2, 2.77, 3.5, 4.16, 5, 5.55, 6, 7, 8, 10, 12]),
    "price of KL, sd per nat": ("price", [0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4]),
}
SOME = {"last": ("step", np.inf), "KL 5": ("kl", 5), "price 0.15": ("price", 0.15)}
FALLS = {"stories": 0.25, "letters": 0.1, "verifier": 0.1}  # of gold below its best so far
NAMES = "world penalty seed feedback step kl score gold".split()


@dataclass
class Config:
    """What rules that see no gold lose by stopping PPO where they do."""

    rows: str = arg("docs/results", "folder of overoptimization.csv and the other rows")
    letters: str = arg("two_judges", "which file of these, without .csv, has the rows of letters")
    to: str = arg("out/when_to_stop.png", "the picture")


def main(cfg):
    worlds = curves(cfg.rows, cfg.letters)
    if not all(worlds.values()):
        die(f"--rows {cfg.rows} --letters {cfg.letters}: needs runs of {', '.join(worlds)}")
    print(f"{'gold lost':35}", *(f"{f'{w}, {len(runs)} runs':>17}" for w, runs in worlds.items()))
    for rule, (watched, limits) in RULES.items():
        print_losses(worlds, rule, watched, limits)
    for world, runs in worlds.items():
        for penalty in sorted({run["penalty"] for run in runs}):
            some = [run for run in runs if run["penalty"] == penalty]
            cells = (f"{name}: {cell(some, lost(some, *rule))}" for name, rule in SOME.items())
            print(f"{world:8} {penalty:12}", *cells)
        for limit in (3, 4, 5, 6, 8):
            print(f"{world}: KL > {limit}", alarms(runs, limit, FALLS[world]))
    # of a policy: KL, which others have not, and score
    end = lambda row: (float(row["KL"] or "nan"), float(row.get("reward", "nan")), row["model"])
    for name in ("films_smollm2", "harmless_ppo", "harmless_ppo_128"):
        print_ends(name, read(cfg.rows, name, end))
    draw(cfg, worlds)


def read(folder, name, of, flag="--rows"):
    """What `of` makes of each row of a file of results, which is a dict of texts."""
    try:
        return list(map(of, csv.DictReader(Path(folder, f"{name}.csv").read_text().splitlines())))
    except (OSError, KeyError, TypeError, ValueError, AttributeError, csv.Error) as error:
        die(f"{flag}: {folder}/{name}.csv: {type(error).__name__}: {reason(error)}")


def point(row):
    """A checkpoint: (which run it is of, its quantities)."""
    world = {None: "stories", "reward model": "letters"}.get(row.get("judge"), "verifier")
    penalty = row.get("by") or row["flags"].split(", ")[-1]
    quantities = [float(row[name]) for name in ("step", "kl", "proxy", "gold")]
    return (world, penalty, row["seed"], row.get("feedback")), quantities


def curves(folder, letters):
    """{world: PPO runs}. A run is a dict: which it is, and an array for each quantity."""
    stories, points = read(folder, "overoptimization", point), {}
    for run, quantities in stories + read(folder, letters, point, "--letters"):
        if "best of n" not in run:
            points.setdefault(run, []).append(quantities)
    runs = [dict(zip(NAMES, (*key, *np.array(rows).T))) for key, rows in points.items()]
    return {world: [run for run in runs if run["world"] == world] for world in FALLS}


def chosen(run, watched, limit):
    """Index of the checkpoint that a rule keeps."""
    if watched == "price":
        return (run["score"] - limit * run["kl"]).argmax()
    passed = run[watched] > limit
    return max(passed.argmax() - 1, 0) if passed.any() else len(passed) - 1


def lost(runs, watched, limit):
    """Gold of each run's best checkpoint less that of the one that is kept, (runs,)."""
    return np.array([r["gold"].max() - r["gold"][chosen(r, watched, limit)] for r in runs])


def elsewhere(table, labels):
    """What each run loses with the limit that on average loses least in the runs of other labels.
    table: losses, (limits, runs)."""
    best = [table[:, np.array(labels) != label].mean(1).argmin() for label in labels]
    return table[best, range(len(labels))]


def by_seed(runs, losses):
    """Means: (..., runs) -> (seeds, ...)."""
    seeds = np.array([run["seed"] for run in runs])
    return np.array([losses[..., seeds == seed].mean(-1) for seed in dict.fromkeys(seeds)])


def cell(runs, losses):
    """Their mean and its 95 % interval over seeds, as text."""
    return "{:8.3f} +- {:5.3f}".format(*interval(by_seed(runs, losses)))


def print_losses(worlds, rule, watched, limits):
    """A line for each limit; and for those that lose least in runs of other seeds, amounts of
    feedback, penalties."""
    tables = {w: np.array([lost(runs, watched, x) for x in limits]) for w, runs in worlds.items()}
    for i, limit in enumerate(limits):
        print(f"{rule:26}{limit:9g}", *(cell(runs, tables[w][i]) for w, runs in worlds.items()))
    for by in ("seed", "feedback", "penalty") if len(limits) > 1 else ():
        labels = {w: [run[by] for run in runs] for w, runs in worlds.items()}
        known = {w: elsewhere(tables[w], x) for w, x in labels.items() if len(set(x)) > 1}
        print(f"{rule:26}{by:>9}", *(cell(worlds[w], losses) for w, losses in known.items()))


def alarms(runs, limit, fall):
    """How well KL beyond a limit says that gold falls by so much below its best so far."""
    below = lambda gold: np.maximum.accumulate(gold) - gold
    first = lambda run, signs: min(run["step"][signs], default=np.inf)
    pairs = [(first(r, r["kl"] > limit), first(r, below(r["gold"]) > fall)) for r in runs]
    ahead = sorted(fell - rang for rang, fell in pairs if max(rang, fell) < np.inf)
    fine = [rang for rang, fell in pairs if fell == np.inf]
    text = f"finds {len(ahead)} of {len(runs) - len(fine)}, false {len(fine) - fine.count(np.inf)}"
    return f"{text} of {len(fine)}, iterations ahead {', '.join(f'{x:g}' for x in ahead)}"


def print_ends(name, ends):
    """What rules keep of policies that were trained with several penalties, by growing KL."""
    ends = sorted(end for end in ends if end[0] >= 0) or die(f"--rows: {name}.csv: no KL in it")
    kl, score, models = map(np.array, zip(*ends))
    for rule in ("KL 5", "price 0.15")[: 2 - np.isnan(score[0])]:
        kept = models[chosen({"kl": kl, "score": score}, *SOME[rule])]
        print(f"{name}, KL {', '.join(f'{x:.1f}' for x in kl)}: {rule} keeps {kept}")


def draw(cfg, worlds):
    """What a limit and a price lose, of each value; faint: each seed."""
    figure, axes = picture.pyplot().subplots(1, 2, figsize=(10, 4), sharey=True)
    for ax, (rule, (watched, limits)) in zip(axes, list(RULES.items())[-2:]):
        for (world, runs), color, ls in zip(worlds.items(), picture.COLOURS, picture.LINES):
            y = by_seed(runs, np.array([lost(runs, watched, limit) for limit in limits]))
            line(ax, np.array([limits] * len(y)), y, world, color=color, ls=ls)
        ax.set(xlabel=rule, ylabel="gold lost beside the best checkpoint")
    picture.save(figure, cfg.to)


if __name__ == "__main__":
    main(from_cli(Config))
