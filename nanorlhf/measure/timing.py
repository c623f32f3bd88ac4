"""Clocks for `bench`: `race` times things in turns, `phase_clock` times the phases of one."""

import platform
import re
import resource
import sys
import time
from pathlib import Path
from statistics import median

import torch

SHORTEST = 0.1  # seconds; a repetition of quicker work is several calls
PHASES = {  # functions of train_ppo.py -> what a table calls them
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
    """The device's name, for a title."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    name = found.group(1) if found else platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def memory():
    """The peak of this process's resident memory in GiB; a GPU's memory stands beside each time."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if platform.system() == "Darwin" else 1024) / 2**30


def say(text):
    """Progress: on stderr, so that stdout holds the results alone."""
    print(f"  ... {text}", file=sys.stderr, flush=True)


class Timed:
    """A function of no arguments and its timings. A repetition is `loops` calls in a row; `seconds`
    has each repetition's seconds per call, `results` what its last call returned, and `peak` the
    most bytes that tensors took on a GPU."""

    def __init__(self, work, device):
        self.work, self.device, self.loops = work, device, 1
        self.seconds, self.results, self.peak = [], [], 0

    def call(self):
        """One repetition: (seconds per call, result)."""
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(self.loops):
            result = self.work()
        synchronize(self.device)
        return (time.perf_counter() - start) / self.loops, result

    def warm_up(self):
        """Call once or, if that is quick, twice: the first call may compile, or fill caches. Sets
        `loops`, and returns how many seconds a repetition will take."""
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
    """Time every work in {name: work}; returns {name: Timed}. In each of `repeats` turns all have
    one repetition, and each turn begins with another one.

    `host` is for TRL, whose loop cannot be called step by step: host(turn) runs that loop, calls
    turn(i) between its iterations, and returns the seconds of its own."""
    print(f"\n{title}", flush=True)
    runs = {name: Timed(work, device) for name, work in works.items()}
    each = sum(run.warm_up() for run in runs.values())
    say(f"warmed up; {repeats} repetitions of {', '.join(map(str, runs))}: {each * repeats:.0f} s")

    def turn(i):
        names = list(runs)
        for j in range(len(names)):
            run = runs[names[(i + j) % len(names)]]
            if host and device.type == "cuda":
                run.call()  # TRL empties the allocator's cache: fill it again before the clock runs
            run.repeat()

    if host:
        hosted = Timed(None, device)
        hosted.seconds = host(turn)
        return runs | {"trl": hosted}
    for i in range(repeats):
        turn(i)
    return runs


def ratio(ours, theirs):
    """(how many times faster ours is by the medians, and the least and the most of the same ratio
    repetition by repetition)."""
    paired = [b / a for a, b in zip(ours.seconds, theirs.seconds)]
    return theirs.median / ours.median, min(paired), max(paired)


def show(name, run, tokens, limit=""):
    """Print a Timed. A call handles `tokens` tokens; `limit` says how near to a limit it came."""
    held = f", peak {run.peak / 2**30:.2f} GiB" if run.peak else ""
    least, most = min(run.seconds), max(run.seconds)
    print(
        f"  {name:15}{run.median:9.4f} s [{least:.4f}, {most:.4f}] "
        f"{tokens / run.median:12,.0f} tokens/s  {limit}{held}",
        flush=True,
    )


def compare(runs, ours, peer, figure):
    """Print and return {figure: how many times faster ours is}; {} where the peer did not run."""
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
    """Wrap those functions in `names`, vars(module), that PHASES lists. Returns {name: seconds so
    far}, which every call adds to. A GPU is waited for before and after each function, and nowhere
    else."""
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
