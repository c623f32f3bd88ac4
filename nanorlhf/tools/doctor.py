"""What is wrong with a run, and what to try: run/doctor.py's rules, applied to a finished run."""

from dataclasses import dataclass
from pathlib import Path

from nanorlhf.config import arg, die
from nanorlhf.run.checkpoint import config_of
from nanorlhf.run.doctor import RECENT, Doctor
from nanorlhf.run.metrics import read_rows


@dataclass
class Config:
    """Say whether runs look healthy: KL, entropy, clipping, values, lengths, ends, reward hacking,
    reward models at chance, overfitting; for each finding what it means and what to try."""

    runs: list[str] = arg(["out/ppo"], "folders of any stage", positional=True)


def main(cfg):
    for run in cfg.runs:
        rows, findings = rows_of(run), examine(run)
        for finding in findings:
            print(f"{run}: {finding}")
        if not findings:
            enough = "healthy" if len(rows) >= 2 * RECENT else "too short for most findings"
            print(f"{run}: {enough}: {len(rows)} rows, nothing to report")


def examine(run):
    """All findings about a run's folder, in the order of the rows in which they showed."""
    rows, flags = rows_of(run), config_of(run)["flags"]
    # stages counted in epochs have no max_steps: their last row is the end
    doctor = Doctor(flags, flags.get("max_steps") or rows[-1]["step"])
    return [finding for row in rows for finding in doctor.read(row)]


def rows_of(run):
    """The rows of a run's metrics as dicts of numbers."""
    _, rows = read_rows(Path(run, "metrics.csv"))
    rows = [{k: float(x) for k, x in row.items()} for row in rows]
    return rows or die(f"{run}/metrics.csv: no rows of metrics yet")
