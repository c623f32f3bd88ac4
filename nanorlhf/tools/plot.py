"""Pictures: the training curves of one or several runs, and the ladder of `evaluate`."""

import math
from dataclasses import dataclass
from pathlib import Path

from nanorlhf.config import arg, die, reason
from nanorlhf.run.metrics import read_rows

PANELS = ("eval_scores", "eval_gold", "eval_kl_exact", "val_loss", "val_accuracy", "loss")
AXES = {  # column of metrics.csv -> what its axis says, with the unit
    "loss": "training loss, nats",
    "val_loss": "held-out loss, nats",
    "val_accuracy": "held-out accuracy, share of pairs",
    "scores": "score, sd of the SFT model's",
    "eval_scores": "score, sd of the SFT model's",
    "gold": "gold, utility",
    "eval_gold": "gold, utility",
    "kl": "KL from SFT, nats per response",
    "eval_kl_exact": "KL from SFT, nats per response",
    "entropy": "entropy, nats per token",
    "eval_entropy": "entropy, nats per token",
    "length": "length, tokens",
    "eval_length": "length, tokens",
}
STAGES = (  # curves beside the ladder: folder, columns, title, units
    ("gpt", "val_loss", "1. GPT", "held-out loss, nats per token"),
    ("sft", "val_loss", "2. SFT", "held-out loss, nats per token of a response"),
    ("rm", "val_accuracy", "3. reward model", "held-out accuracy, share of pairs"),
    ("ppo", "scores gold kl", "4. PPO, per rollout", "score in sd, gold in utility, KL in nats"),
)
GREY, BLUE = "#9aa4b2", "#2f6fb3"
# all pictures: colours of unequal darkness and lines of unequal pattern, so that grey print is read
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


@dataclass
class Config:
    """Plot the training curves of run folders side by side, or out/ladder.json."""

    runs: list[str] = arg(["out/ppo"], "stage folders that hold a metrics.csv")
    columns: list[str] = arg([], "columns to draw; default: those worth looking at")
    to: str = arg("out/curves.png", "the picture to write")


def main(cfg):
    tables = {run: read(run) for run in cfg.runs}
    wanted = cfg.columns or PANELS
    columns = [column for column in wanted if any(column in table for table in tables.values())]
    if not columns:
        die(f"none of the columns {', '.join(wanted)} in {', '.join(cfg.runs)}")
    plt = pyplot()
    figure, axes = plt.subplots(1, len(columns), figsize=(4.2 * len(columns), 3.4), squeeze=False)
    for ax, column in zip(axes[0], columns):
        for run, table in tables.items():
            if column in table:
                ax.plot(*table[column], label=run)
        ax.set(title=column, xlabel="step", ylabel=AXES.get(column, ""))
    axes[0][0].legend()
    save(figure, cfg.to)


def pyplot():
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        from cycler import cycler
    except ImportError:
        die("pictures need matplotlib: pip install -e '.[plot]'")
    plt.rcParams.update(STYLE)
    plt.rcParams["axes.prop_cycle"] = cycler(color=COLOURS) + cycler(linestyle=LINES)
    return plt


def seeds(numbers):
    """`seeds 1 to 3`, for a caption."""
    first, *others = numbers
    if len(others) > 1 and numbers == list(range(first, first + len(numbers))):
        return f"seeds {first} to {numbers[-1]}"
    return f"seed{'s' * bool(others)} {', '.join(map(str, numbers))}"


def save(figure, path):
    if Path(path).suffix not in (".png", ".pdf", ".svg"):
        die(f"--to {path}: a picture ends in .png, .pdf or .svg")
    figure.tight_layout()
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    except OSError as error:
        die(f"{path}: {reason(error)}")
    print(f"wrote {path}")


def read(run):
    """metrics.csv -> {column: (steps, values)}, blank cells left out."""
    table = {}
    for row in read_rows(Path(run, "metrics.csv"))[1]:
        step = int(row.pop("step"))
        for name, cell in row.items():
            steps, values = table.setdefault(name, ([], []))
            steps.append(step)
            values.append(float(cell))
    return table


def ladder(out, rows):
    """out/ladder.png: the gold utility of every rung with its interval, beside the curves of those
    stages that have metrics. Grey rungs are no fine-tuned model of their own."""
    panels = [panel for panel in STAGES if Path(out, panel[0], "metrics.csv").exists()]
    widths = (2.2, *(1 for _ in panels))
    plt = pyplot()
    figure, axes = plt.subplots(
        1,
        len(widths),
        figsize=(20 / 6.2 * sum(widths), max(3.9, 0.5 * len(rows))),
        width_ratios=widths,
        squeeze=False,
    )
    axes, places = axes[0], range(len(rows))
    gold = [row["gold"] for row in rows]
    error = [row["gold_ci"][1] - row["gold"] for row in rows]
    colours = [GREY if is_baseline(row["model"]) else BLUE for row in rows]
    axes[0].barh(places, gold, xerr=error, color=colours, capsize=3)
    names = [row["model"].replace("_", " ") for row in rows]
    axes[0].set_yticks(places, names, parse_math=False)
    axes[0].invert_yaxis()
    axes[0].grid(visible=False, axis="y")
    axes[0].set_title("answers to held-out prompts, with 95 % intervals")
    axes[0].set_xlabel("gold utility, at most 3.9")
    for x, y in zip(gold, places):
        axes[0].text(max(x, 0) + 0.15, y, f"{x:.2f}", va="center")
    axes[0].set_xlim(min(0, *gold) - 0.2, math.ceil(max(gold) + 0.4))
    for ax, (stage, columns, title, units) in zip(axes[1:], panels):
        table = read(f"{out}/{stage}")
        columns = [column for column in columns.split() if column in table]
        for column in columns:
            ax.plot(*table[column], label=column)
        if len(columns) > 1:
            ax.legend()
        ax.set(title=title, xlabel="iteration" if stage == "ppo" else "step", ylabel=units)
    save(figure, f"{out}/ladder.png")


def is_baseline(name):
    return name in ("demonstrations", "base", "base_fewshot") or name.startswith("best_of_")
