"""Clocks for `bench`: whatever is compared runs in turns, and phases are timed inside a run."""

import platform
import re
import resource
import sys
import time
from pathlib import Path
from statistics import median

import torch

SHORTEST = 0.1  # seconds; of quicker work a repetition holds several calls
PHASES = {  # functions of train_ppo.py, timed by name; what runs in none of them is "the rest"
    "make_rollout": "rollout",
    "measure": "measuring",
    "reference_logits": "  of it, the reference",
    "score_rollout": "scoring",
    "update": "update",
}


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    name = name.group(1) if name else platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def memory():
    """The most this process has held so far; a GPU's stands beside each time."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if platform.system() == "Darwin" else 1024) / 2**30


def say(text):
    """Progress, apart from the results."""
    print(f"  ... {text}", file=sys.stderr, flush=True)


class Timed:
    """A piece of work: seconds per call of each repetition, and what the calls returned."""

    def __init__(self, work, device):
        self.work, self.device, self.loops = work, device, 1
        self.seconds, self.results, self.peak = [], [], 0

    def call(self):
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(self.loops):
            result = self.work()
        synchronize(self.device)
        return (time.perf_counter() - start) / self.loops, result

    def warm_up(self):
        """Twice where that is quick: the first call may compile, or fill caches. Returns how long
        a repetition will take."""
        seconds, _ = self.call()
        if seconds < 20:
            seconds, _ = self.call()
        self.loops = min(max(round(SHORTEST / seconds), 1), 1000)
        return seconds * self.loops

    def repeat(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        seconds, result = self.call()
        self.seconds.append(seconds)
        self.results.append(result)
        if self.device.type == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated(self.device))

    @property
    def median(self):
        return median(self.seconds)


def race(title, works, repeats, device, host=None):
    """{name: Timed}: one repetition of each in turn, the first one another each time. host(turn),
    if given, calls turn(i) when it is time for the others, and returns its own seconds."""
    print(f"\n{title}", flush=True)
    runs = {name: Timed(work, device) for name, work in works.items()}
    each = sum(run.warm_up() for run in runs.values())
    say(f"warmed up; {repeats} repetitions of {', '.join(map(str, runs))}: {each * repeats:.0f} s")

    def turn(i):
        names = list(runs)
        for j in range(len(names)):
            run = runs[names[(i + j) % len(names)]]
            if host and device.type == "cuda":
                run.call()  # TRL has emptied the allocator's cache, which is nobody else's habit
            run.repeat()

    if host:
        hosted = Timed(None, device)
        hosted.seconds = host(turn)
        return runs | {"trl": hosted}
    for i in range(repeats):
        turn(i)
    return runs


def ratio(ours, theirs):
    """(how many times faster ours is, by medians; least and most, repetition by repetition)"""
    paired = [b / a for a, b in zip(ours.seconds, theirs.seconds)]
    return theirs.median / ours.median, min(paired), max(paired)


def show(name, run, tokens, limit=""):
    held = f", peak {run.peak / 2**30:.2f} GiB" if run.peak else ""
    least, most = min(run.seconds), max(run.seconds)
    print(
        f"  {name:15}{run.median:9.4f} s [{least:.4f}, {most:.4f}] "
        f"{tokens / run.median:12,.0f} tokens/s  {limit}{held}",
        flush=True,
    )


def compare(runs, ours, peer, figure):
    """{figure: times that ours is faster than the peer}, printed; {} where it did not run."""
    if peer not in runs:
        return {}
    times, least, most = ratio(runs[ours], runs[peer])
    print(
        f"  {ours} over {peer}, as speed: {times:.2f}, "
        f"repetition by repetition {least:.2f} to {most:.2f}"
    )
    return {figure: times}


# ---- inside a run ------------------------------------------------------------------------------


def phase_clock(names, device):
    """Wrap the functions of a module's names, vars(module), that PHASES lists; returns {name:
    seconds so far}. A GPU is waited for at their borders only."""
    seconds = {name: 0.0 for name in PHASES if name in names}

    def timed(name, function):
        def wrapper(*args, **kwargs):
            synchronize(device)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            synchronize(device)
            seconds[name] += time.perf_counter() - start
            return result

        return wrapper

    names.update({name: timed(name, names[name]) for name in seconds})
    return seconds
