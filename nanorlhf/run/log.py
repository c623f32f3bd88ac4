"""What a run says of itself: metrics.csv, timing.csv, lines on the screen, TensorBoard."""

import csv
import os
import time
from pathlib import Path

from tqdm import tqdm

from nanorlhf.config import die, rank, warn
from nanorlhf.machine import durable, ranks
from nanorlhf.run.doctor import Doctor
from nanorlhf.run.metrics import read_rows

# What the screen shows of a row, where it is in it
SHOWN = """loss val_loss val_accuracy scores kl gold entropy eos_rate length approx_kl
explained_variance eval_scores eval_kl_exact eval_gold""".split()


class Log:
    """metrics.csv (no clock in it, so equal runs give equal files), timing.csv, one line per row
    on the screen with the time left, what the doctor finds, and TensorBoard events if asked
    for. Row s of a run describes the model after s updates. Only rank 0 keeps a log."""

    def __init__(self, cfg, start, max_steps):
        self.folder, self.start = Path(cfg.out_dir), start
        self.max_steps = max_steps
        self.header, self.began, self.events = None, time.perf_counter(), None
        if cfg.tensorboard and rank() == 0:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                die("--tensorboard needs its package: pip install tensorboard")
            self.events = SummaryWriter(cfg.out_dir, purge_step=start)
        self.bar = tqdm(total=max_steps, initial=start, disable=rank() > 0 or None, leave=False)
        self.doctor = Doctor(vars(cfg), max_steps)
        if start and rank() == 0:
            self._cut("timing.csv")
            self.header, kept = self._cut("metrics.csv")
            for row in kept:  # what these show has been said before
                self.doctor.read({k: float(x) for k, x in row.items()})

    def _cut(self, name):
        """Drop the rows that will be written again; returns the header and the rows kept."""
        path = self.folder / name
        header, rows = read_rows(path, self.start) if path.exists() else ([], [])
        if not header:
            return None, []

        def fill(partial):
            with partial.open("w", newline="") as file:
                csv.writer(file).writerow(header)
                csv.DictWriter(file, header).writerows(rows)

        durable.write(path, fill)
        return header, rows

    def row(self, step, metrics):
        if rank():
            return
        metrics = {"step": step} | {k: float(v) for k, v in metrics.items()}
        if self.header is None:
            self.header = list(metrics)
            self._write("metrics.csv", self.header, new=True)
            self._write("timing.csv", ["step", "seconds"], new=True)
        if lost := metrics.keys() - set(self.header):
            die(f"{self.folder}/metrics.csv: no column for {', '.join(sorted(lost))}")
        cells = ["" if k not in metrics else f"{metrics[k]:.6g}" for k in self.header[1:]]
        self._write("metrics.csv", [step, *cells])
        seconds = time.perf_counter() - self.began
        self._write("timing.csv", [step, f"{seconds:.2f}"])
        shown = "  ".join(f"{k} {metrics[k]:.4g}" for k in SHOWN if k in metrics)
        done = step - self.start
        left = f"{_clock(seconds / done * (self.max_steps - step))} left" if done else "starting"
        tqdm.write(f"step {step:>5}/{self.max_steps}  {shown}  [{_clock(seconds)}, {left}]")
        for finding in self.doctor.read(metrics):
            self.bar.clear()
            warn(str(finding))
        if self.events:
            for k in metrics.keys() - {"step"}:
                self.events.add_scalar(k, metrics[k], step)

    def _write(self, name, cells, new=False):
        try:
            # "r+": a file that has gone is an error, and not made anew without its header
            with (self.folder / name).open("w" if new else "r+", newline="") as file:
                file.seek(0, os.SEEK_END)
                csv.writer(file).writerow(cells)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            gone = isinstance(error, FileNotFoundError)
            kept = "it was removed" if gone else "the last good checkpoint is kept"
            die(f"{self.folder / name}: {error.strerror}; {kept}")

    def close(self):
        """On all ranks: none goes on before rank 0 has written everything."""

        def close():
            self.bar.close()
            if self.events:
                self.events.close()

        ranks.on_main(close)


def _clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
