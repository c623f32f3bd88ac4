"""This process: the folder that it alone writes to, the signals that end it, its freed memory."""

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
# what asks a run to end: Ctrl-C, kill, and a closed terminal, for which Windows has no signal
ENDING = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP")]
_locked = {}  # folder -> its lock file, held open
_heard = []  # the signal that asked this run to end: (number, when), or nothing yet


def lock(folder):
    """Make a stage's folder and lock it, so that a second run in it exits 2. The lock is the
    system's (flock): it ends with this process, even where that is killed."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if rank() or os.name != "posix" or folder.resolve() in _locked:
            return
        file = open(folder / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        die(f"--out_dir {folder}: {error.strerror}")
    hold(file, folder, "another run is writing there; wait for its end or choose another --out_dir")
    _locked[folder.resolve()] = file


def hold(file, path, why=""):
    """Lock an open file for as long as it is open. Where another process has it, exits 2 with
    `why`, or waits if there is none."""
    if os.name != "posix":
        return
    import fcntl  # here, as Windows has none

    try:
        fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if why else 0))
    except BlockingIOError:
        die(f"{path}: {why}")
    except OSError as error:
        warn(f"{path}: cannot be locked here ({error.strerror}); let no second run write to it")


def listen():
    """From now on the first signal of ENDING asks the run to save after this step and end, and a
    second one ends it at once. What is ignored, as SIGHUP is under nohup, stays ignored. In a
    program that `from_cli` did not start, such as a notebook, signals stay as they are."""
    if signal.getsignal(signal.SIGINT) is config.interrupted:
        for number in ENDING:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, _hear)


def _hear(number, frame):
    if not _heard:
        _heard.append((number, time.monotonic()))
        say("ends after this step, saved; once more to end now")
    # within a second it is the same request: Ctrl-C reaches torchrun too, which passes it on
    elif time.monotonic() > _heard[0][1] + 1:
        say("interrupted: --resume goes on from the last checkpoint")
        raise SystemExit(128 + number)


def say(message):
    if rank() == 0:
        print(f"\n{message}", file=sys.stderr, flush=True)


def deafen():
    """Undo `listen`: the run is saved, and a signal may end the program at once again."""
    for number in ENDING:
        if signal.getsignal(number) is _hear:
            after = config.interrupted if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, after)


def heard():
    """The signal that asks this run to end, or None."""
    return _heard[0][0] if _heard else None


def keep_freed_memory(below=KEPT_BELOW):
    """Keep the memory of freed tensors of less than `below` bytes for the next ones. By default
    glibc hands the pages of large ones back to the system, which fills them with zeros before they
    are used again: a tenth of a training step on a CPU."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3  # see mallopt(3)
        mallopt(m_trim_threshold, -1)
        mallopt(m_top_pad, 2**26)
        mallopt(m_mmap_threshold, below)


def kept_below(n_parameters):
    """`below` for a model of so many parameters: small for a large one. Kept memory has holes that
    glibc cannot fill with other tensors, because it aligns them. With the tensors of a large model
    the holes grew to twice the size of the tensors."""
    return KEPT_BELOW if n_parameters < 8e6 else 2**20


def commit():
    """The git commit of this program's source; "" where there is none."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # git is not installed
        return ""
