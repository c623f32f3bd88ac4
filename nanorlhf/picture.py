"""What all pictures share: their style, the curves of a run, and how one is written. And one that
two commands would draw: the ladder of `evaluate`.
"""

import csv
import math
from collections import defaultdict
from pathlib import Path

from nanorlhf.config import die, package, reason
from nanorlhf.machine.python_file import ROOT
from nanorlhf.run.checkpoint import config_of
from nanorlhf.run.metrics import read_rows

HEALTHY = ROOT / "docs/results/healthy.csv"  # by experiments/mistakes.py: runs at default flags
# their flags that decide what a column measures: with another one it is no longer the same quantity
SAME = {"data": [], "val_data": [], "tokenizer": "bpe", "vocab_size": 768, "feedback": "rankings"}
GREY, BLUE = "#9aa4b2", "#2f6fb3"
# colours of unequal darkness and lines of unequal pattern, so that grey print can be read
COLOURS = ["#1f3a5f", "#d1662b", "#3f9c94", "#b04a8f", "#c2a83e", "#7a8796"]
LINES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1))]
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.titlesize": 10,
    "font.size": 9,
    "grid.alpha": 0.25,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
}
STAGES = (  # curves beside the ladder: folder, columns, title, units
    ("gpt", "val_loss", "1. GPT", "held-out loss, nats per token"),
    ("sft", "val_loss", "2. SFT", "held-out loss, nats per token of a response"),
    ("rm", "val_accuracy", "3. reward model", "held-out accuracy, share of pairs"),
    ("ppo", "scores gold kl", "4. PPO, per rollout", "score in sd, gold in utility, KL in nats"),
)


def pyplot():
    """matplotlib.pyplot in our style, writing files and opening no window."""
    package("matplotlib", "a picture", "plot").use("Agg")
    import matplotlib.pyplot as plt

    cycle = plt.cycler(color=COLOURS, linestyle=LINES)
    plt.rcParams.update(STYLE | {"axes.prop_cycle": cycle})
    return plt


def read(run):
    """metrics.csv of a run -> {column: (steps, values)}, blank cells left out."""
    table = {}
    for row in read_rows(Path(run, "metrics.csv"))[1]:
        step = int(row.pop("step"))
        for name, cell in row.items():
            steps, values = table.setdefault(name, ([], []))
            steps.append(step)
            values.append(float(cell))
    return table


def healthy(runs):
    """{column: (steps, least values, greatest values)} of the healthy runs of a stage; {} where
    not all of `runs` are of that stage and of the embedded world, and measure the same."""
    stages, band = set(), {}
    for config in map(config_of, runs):
        flags = SAME | config["flags"]
        judges = f"{flags.get('reward')} {flags.get('gold')}"
        is_same = SAME.items() <= flags.items() and ".py" not in judges
        stages.add(config.get("stage") if is_same else None)
    if len(stages) > 1 or not HEALTHY.is_file():
        return band
    with HEALTHY.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["stage"] in stages]
    for column in rows[0] if rows else ():
        values = defaultdict(list)
        for row in rows:
            if column not in ("stage", "seed", "step") and row[column]:
                values[int(row["step"])].append(float(row[column]))
        # a stage counted in epochs ends a few steps earlier with one seed than with another
        shared = [step for step in values if len(values[step]) == len({r["seed"] for r in rows})]
        if shared:
            band[column] = shared, *([f(values[s]) for s in shared] for f in (min, max))
    return band


def save(figure, path):
    if Path(path).suffix not in (".png", ".pdf", ".svg"):
        die(f"--to {path}: a picture ends in .png, .pdf or .svg")
    figure.tight_layout()
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    except OSError as error:
        die(f"{path}: {reason(error)}")
    pyplot().close(figure)  # it would stay in memory
    print(f"wrote {path}")


def ladder(out, rungs, path):
    """The gold utility of every rung with its interval, beside the curves of those stages under
    `out` that have metrics."""
    panels = [panel for panel in STAGES if Path(out, panel[0], "metrics.csv").exists()]
    size = 7.1 + 3.2 * len(panels), max(3.9, 0.5 * len(rungs))
    figure, (axes,) = pyplot().subplots(
        1, 1 + len(panels), figsize=size, width_ratios=[2.2] + [1] * len(panels), squeeze=False
    )
    draw_rungs(axes[0], rungs)
    for ax, (stage, columns, title, units) in zip(axes[1:], panels):
        curves = read(f"{out}/{stage}")
        columns = [column for column in columns.split() if column in curves]
        for column in columns:
            ax.plot(*curves[column], label=column)
        if len(columns) > 1:
            ax.legend()
        ax.set(title=title, xlabel="iteration" if stage == "ppo" else "step", ylabel=units)
    save(figure, path)


def draw_rungs(ax, rungs):
    """A bar for each rung. Grey ones are no fine-tuned model of their own."""
    places, gold = range(len(rungs)), [rung["gold"] for rung in rungs]
    error = [rung["gold_ci"][1] - rung["gold"] for rung in rungs]
    names = [rung["model"] for rung in rungs]
    plain = ("demonstrations", "base", "base_fewshot", "best_of_")
    colours = [GREY if name.startswith(plain) else BLUE for name in names]
    ax.barh(places, gold, xerr=error, color=colours, capsize=3)
    ax.set_yticks(places, [name.replace("_", " ") for name in names], parse_math=False)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    for x, y in zip(gold, places):
        ax.text(max(x, 0) + 0.15, y, f"{x:.2f}", va="center")
    ax.set_xlim(min(0, *gold) - 0.2, math.ceil(max(gold) + 0.4))
    ax.set(title="answers to held-out prompts, 95 % intervals", xlabel="gold utility, at most 3.9")
