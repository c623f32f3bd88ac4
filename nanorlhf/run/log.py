"""What a run says of itself: metrics.csv, timing.csv, lines on the screen."""

import csv
import os
import time
from pathlib import Path

from tqdm import tqdm

from nanorlhf.config import die, doing, warn
from nanorlhf.machine import durable, ranks
from nanorlhf.machine.process import rank
from nanorlhf.run.doctor import Doctor
from nanorlhf.run.metrics import read_rows

# The metrics that the screen shows, of those that a row has
SHOWN = """loss val_loss val_accuracy scores kl gold entropy eos_rate length approx_kl
explained_variance eval_scores eval_kl_exact eval_gold""".split()


class Log:
    """Each row goes to metrics.csv, to the screen with the time left, and to the doctor. Times go
    to timing.csv, so equal runs give equal metrics.csv. Row s of a run describes the model after s
    updates. Only rank 0 keeps a log."""

    def __init__(self, cfg, start, max_steps):
        self.folder, self.start, self.max_steps = Path(cfg.out_dir), start, max_steps
        self.began = time.perf_counter()
        self.header = None  # of metrics.csv; the first row decides it
        doing("first step, and evaluation where one is due")
        self.bar = tqdm(total=max_steps, initial=start, disable=rank() > 0 or None, leave=False)
        self.doctor = Doctor(vars(cfg), max_steps)
        if start and rank() == 0:
            self._cut("timing.csv")
            self.header, rows = self._cut("metrics.csv")
            for row in rows:  # the doctor learns of them, and what it finds has been said before
                self.doctor.read({name: float(cell) for name, cell in row.items()})

    def _cut(self, name):
        """Drop a file's rows that will be written again; returns (header, rows kept)."""
        path = self.folder / name
        header, rows = read_rows(path, self.start) if path.exists() else ([], [])
        if header:
            kept = path.read_bytes().splitlines(keepends=True)[: 1 + len(rows)]
            with durable.or_exit(path):
                os.truncate(path, sum(map(len, kept)))
        return header or None, rows

    def row(self, step, metrics):
        """Log a row of metrics. The first row of a run fixes the columns; a later metric that has
        none exits 2."""
        if rank():
            return
        metrics = {"step": step} | {name: float(x) for name, x in metrics.items()}
        if self.header is None:
            self.header = list(metrics)
            self._write("metrics.csv", self.header, new=True)
            self._write("timing.csv", ["step", "seconds"], new=True)
        if homeless := sorted(metrics.keys() - set(self.header)):
            die(f"{self.folder}/metrics.csv: no column for {', '.join(homeless)}")
        cells = [f"{metrics[name]:.6g}" if name in metrics else "" for name in self.header[1:]]
        self._write("metrics.csv", [step, *cells])
        seconds = time.perf_counter() - self.began
        self._write("timing.csv", [step, f"{seconds:.2f}"])
        shown = "  ".join(f"{name} {metrics[name]:.4g}" for name in SHOWN if name in metrics)
        clock = tqdm.format_interval
        to_come = seconds / max(step - self.start, 1) * (self.max_steps - step)
        left = f"{clock(to_come)} left" if step > self.start else "starting"
        tqdm.write(f"step {step:>5}/{self.max_steps}  {shown}  [{clock(seconds)}, {left}]")
        for finding in self.doctor.read(metrics):
            self.bar.clear()
            warn(str(finding))

    def _write(self, name, cells, new=False):
        path, mode = self.folder / name, "w" if new else "r+"  # "a" would make a removed one anew
        with durable.or_exit(path, "; the last good checkpoint is kept"):
            with path.open(mode, newline="") as file:
                file.seek(0, os.SEEK_END)
                csv.writer(file).writerow(cells)
            durable.flush(path)

    def close(self):
        """End the log. Every rank must call this: none goes on before rank 0 has written all."""
        ranks.on_main(self.bar.close)
