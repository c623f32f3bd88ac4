"""This process as the outside knows it: its rank, the signals that end it, who reads what it
prints. Nothing of this project is imported here: config.py stands on it.
"""

import ctypes
import io
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

# what asks a run to end: Ctrl-C, kill, and a closed terminal, for which Windows has no signal
ENDING = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP")]
_heard = []  # the signal that asked this run to end: (number, when), or nothing yet


def world_size():
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank():
    """Which of them this one is, from 0."""
    return int(os.environ.get("RANK", 0))


# ---- what a program of ours begins with --------------------------------------------------------


def start():
    """Ctrl-C ends this program in one line; what it prints is in a file line by line, may be any
    text, and may lose its reader."""
    signal.signal(signal.SIGINT, interrupted)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed from the start
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__"):
            raw = io.BufferedWriter(Outlasting(stream.fileno(), "w", closefd=False))
            text = {"encoding": stream.encoding, "errors": "backslashreplace"}
            setattr(sys, name, io.TextIOWrapper(raw, line_buffering=True, **text))


class Outlasting(io.FileIO):
    """A stream whose reader may go, as a closed terminal and `| head` do. What is written then is
    lost, and the program goes on."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError:
            return len(data)


def interrupted(number, frame):
    say("interrupted")
    raise SystemExit(128 + number)


def say(message):
    if rank() == 0:
        print(f"\n{message}", file=sys.stderr, flush=True)


# ---- a run that is asked to end ----------------------------------------------------------------


def listen():
    """From now on the first signal of ENDING asks the run to save after this step and end, and a
    second one ends it at once. What is ignored, as SIGHUP is under nohup, stays ignored. In a
    program that `start` did not begin, such as a notebook, signals stay as they are."""
    if signal.getsignal(signal.SIGINT) is interrupted:
        for number in ENDING:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, hear)


def hear(number, frame):
    if not _heard:
        _heard.append((number, time.monotonic()))
        say("ends after this step, saved; once more to end now")
    # within a second it is the same request: Ctrl-C reaches torchrun too, which passes it on
    elif time.monotonic() > _heard[0][1] + 1:
        interrupted(number, frame)


def heard():
    """The signal that asks this run to end, or None."""
    return _heard[0][0] if _heard else None


# ---- what else it is ---------------------------------------------------------------------------


def keep_freed_memory(n_parameters=0):
    """Keep the memory of freed tensors for the next ones. By default glibc hands the pages of large
    ones back to the system, which fills them with zeros before they are used again: of the demo's
    training step on a CPU these were 7 to 17 % (medians of 20, in turns). Of a large model only
    small tensors are kept: between large ones holes stay, which grew to twice the tensors' size."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, -1)  # M_TRIM_THRESHOLD, see mallopt(3)
        mallopt(-2, 2**26)  # M_TOP_PAD
        # M_MMAP_THRESHOLD, the size in bytes below which memory is kept; 2**25 is the largest
        mallopt(-3, 2**25 if n_parameters < 8e6 else 2**20)


def commit():
    """The git commit of this program's source; "" where there is none."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # git is not installed
        return ""
