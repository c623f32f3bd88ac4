"""One process for one folder, how it is told to end, and how it keeps its memory."""

import ctypes
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

from nanorlhf import config
from nanorlhf.config import die, rank, warn

KEPT_BELOW = 2**25  # bytes; the largest threshold that glibc takes
_locked = {}  # folder -> open file
_heard = []  # signals: (number, when)


def lock(folder):
    """Make a stage's folder and hold it: a second run in it exits 2. The lock is the system's
    (flock), so it ends with this process, in whatever way that ends."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if rank() or os.name != "posix" or folder.resolve() in _locked:
            return
        file = open(folder / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        die(f"--out_dir {folder}: {error.strerror}")
    import fcntl  # there is none on Windows

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        die(f"{folder}: another run is writing there; wait for its end or choose another --out_dir")
    except OSError as error:
        warn(f"{folder}: cannot be locked here ({error.strerror}); let no second run write to it")
    _locked[folder.resolve()] = file


def listen():
    """From now on the first SIGINT or SIGTERM is an order to save after this step and end, the
    second one to end at once. Only in a program of ours: `from_cli` has left its mark."""
    if signal.getsignal(signal.SIGINT) is config.interrupted:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _hear)


def _hear(number, frame):
    if _heard:
        if time.monotonic() > _heard[0][1] + 1:  # or it came from terminal and torchrun at once
            config.interrupted(number, frame)
        return
    _heard.append((number, time.monotonic()))
    if rank() == 0:
        print("\nends after this step, saved; once more to end now", file=sys.stderr, flush=True)


def deafen():
    """The run is saved: a signal ends the program at once again."""
    if signal.getsignal(signal.SIGINT) is _hear:
        signal.signal(signal.SIGINT, config.interrupted)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def heard():
    """The signal that asks this run to end, or None."""
    return _heard[0][0] if _heard else None


def keep_freed_memory(below=KEPT_BELOW):
    """glibc hands the pages of large freed tensors back to the system, which zeroes them again for
    the next ones: a tenth of a training step on a CPU. Keep those of less than `below` bytes."""
    if platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3  # see mallopt(3)
        for option, value in (
            (m_trim_threshold, -1),
            (m_top_pad, 2**26),
            (m_mmap_threshold, below),
        ):
            ctypes.CDLL(None).mallopt(option, value)


def kept_below(n_parameters):
    """What to keep: of a large model little, as the holes between its tensors, which glibc cannot
    fill with other aligned ones, grew to twice the tensors themselves."""
    return KEPT_BELOW if n_parameters < 8e6 else 2**20


def commit():
    """Of this program's source, or nothing."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine: the commit is unknown, and that is no error
        return ""
