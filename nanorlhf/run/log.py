"""What a run says of itself: metrics.csv, timing.csv, lines on the screen."""

import csv
import os
import time
from pathlib import Path

from tqdm import tqdm

from nanorlhf.config import doing, note, warn
from nanorlhf.machine import durable, ranks
from nanorlhf.machine.process import rank
from nanorlhf.run.doctor import Doctor
from nanorlhf.run.metrics import read_rows

# The metrics that the screen shows, of those that a row has
SHOWN = """loss val_loss val_accuracy scores kl gold entropy eos_rate length approx_kl
explained_variance eval_scores eval_kl_exact eval_gold""".split()


class Log:
    """Each row goes to metrics.csv, to the screen with the time left, to the doctor, and to
    on_row({name: number}) if that is given. Times go to timing.csv, so equal runs give equal
    metrics.csv. Row s of a run describes the model after s updates. Only rank 0 keeps a log."""

    def __init__(self, cfg, start, max_steps, on_row=None):
        self.folder, self.start, self.max_steps = Path(cfg.out_dir), start, max_steps
        self.began, self.on_row = time.perf_counter(), on_row
        self.headers = {"metrics.csv": [], "timing.csv": []}  # the columns of each file
        doing("first step, and evaluation where one is due")
        self.bar = tqdm(total=max_steps, initial=start, disable=rank() > 0 or None, leave=False)
        self.doctor = Doctor(vars(cfg), max_steps)
        if start and rank() == 0:
            self._cut("timing.csv")
            for row in self._cut("metrics.csv"):  # what the doctor finds has been said before
                self.doctor.read({name: float(cell) for name, cell in row.items()})

    def _cut(self, name):
        """Drop a file's rows that will be written again; returns those that are kept."""
        path = self.folder / name
        self.headers[name], rows = read_rows(path, self.start) if path.exists() else ([], [])
        if self.headers[name]:
            kept = path.read_bytes().splitlines(keepends=True)[: 1 + len(rows)]
            with durable.or_exit(path):
                os.truncate(path, sum(map(len, kept)))
        return rows

    def row(self, step, metrics):
        """Log a row of metrics, {name: number}."""
        if rank():
            return
        metrics = {"step": step} | {name: float(x) for name, x in metrics.items()}
        cells = {name: f"{x:.6g}" for name, x in metrics.items()}
        self._write("metrics.csv", cells | {"step": step})
        seconds = time.perf_counter() - self.began
        self._write("timing.csv", {"step": step, "seconds": f"{seconds:.2f}"})
        shown = "  ".join(f"{name} {metrics[name]:.4g}" for name in SHOWN if name in metrics)
        clock = tqdm.format_interval
        to_come = seconds / max(step - self.start, 1) * (self.max_steps - step)
        left = f"{clock(to_come)} left" if step > self.start else "starting"
        tqdm.write(f"step {step:>5}/{self.max_steps}  {shown}  [{clock(seconds)}, {left}]")
        for finding in self.doctor.read(metrics):
            self.bar.clear()
            warn(str(finding))
        if self.on_row:
            self.on_row(metrics)

    def _write(self, name, row):
        """Add a row, {column: cell}. A column that the file lacks becomes its last, blank in the
        rows so far: which columns a run has depends on the row that it begins with, and on flags
        that may change where it goes on."""
        path, header = self.folder / name, self.headers[name]
        with durable.or_exit(path, "; the last good checkpoint is kept"):
            if new := [column for column in row if column not in header]:
                rows = read_rows(path)[1] if header else []
                header += new
                durable.write(path, lambda partial: write_table(partial, header, rows))
            with path.open("r+", newline="") as file:  # "a" would make a removed file anew
                file.seek(0, os.SEEK_END)
                csv.DictWriter(file, header).writerow(row)
            durable.flush(path)

    def close(self):
        """End the log. Every rank must call this: none goes on before rank 0 has written all."""
        ranks.on_main(self.bar.close)


def show_sample(prompt, text):
    """Print what was asked, all turns of it, and what a model said."""
    for what, words in (("prompt", prompt), ("sample", text)):
        note(f"  {what} | " + words.replace("\n", "\n         | "))


def write_table(path, header, rows):
    with path.open("w", newline="") as file:
        csv.DictWriter(file, header).writeheader()
        csv.DictWriter(file, header).writerows(rows)
