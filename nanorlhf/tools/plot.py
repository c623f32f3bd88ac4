"""The training curves of one or several runs, side by side. Grey behind them, where they learn from
the embedded world: between the least and the greatest value of healthy runs."""

from dataclasses import dataclass

from nanorlhf.config import arg, die
from nanorlhf.picture import GREY, healthy, pyplot, read, save

PANELS = ("eval_scores", "eval_gold", "eval_kl_exact", "val_loss", "val_accuracy", "loss")
AXES = {  # column of metrics.csv, without eval_ and _exact -> what its axis says, with the unit
    "loss": "training loss, nats",
    "val_loss": "held-out loss, nats",
    "val_accuracy": "held-out accuracy, share of pairs",
    "scores": "score, sd of the SFT model's",
    "gold": "gold, utility",
    "kl": "KL from SFT, nats per response",
    "entropy": "entropy, nats per token",
    "length": "length, tokens",
}


@dataclass
class Config:
    """Plot the training curves of run folders side by side."""

    runs: list[str] = arg(["out/ppo"], "stage folders that hold a metrics.csv")
    columns: list[str] = arg([], "columns to draw; default: those worth looking at")
    to: str = arg("out/curves.png", "the picture to write")


def main(cfg):
    tables, band = {run: read(run) for run in cfg.runs}, healthy(cfg.runs)
    known = set().union(*tables.values())
    columns = cfg.columns or [column for column in PANELS if column in known] or PANELS
    if absent := ", ".join(column for column in columns if column not in known):
        die(f"none of the columns {absent} in {', '.join(cfg.runs)}")
    size = 4.2 * len(columns), 3.4
    figure, axes = pyplot().subplots(1, len(columns), figsize=size, squeeze=False)
    for ax, column in zip(axes[0], columns):
        if column in band:
            ax.fill_between(*band[column], color=GREY, alpha=0.3, lw=0, label="healthy runs")
        for run, table in tables.items():
            # empty where a run has no such column: every run keeps its colour and its legend
            ax.plot(*table.get(column, ([], [])), label=run)
        unit = AXES.get(column.removeprefix("eval_").removesuffix("_exact"), "")
        ax.set(title=column, xlabel="step", ylabel=unit)
    axes[0][0].legend()
    save(figure, cfg.to)
