"""Files that are whole and on the disk, or not there at all; and locks, by which two programs do
not write to one place.

A file or folder is written under another name first. Once it is complete and on the disk, a rename
gives it its own name, and a rename is never half done.
"""

import hashlib
import os
import pickle
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch

from nanorlhf.config import die, reason, warn
from nanorlhf.machine.process import rank

_locked = {}  # folder -> its lock file, held open


def digest(path):
    """The sha256 of a file's contents."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path):
    """Force a file's contents, or the names in a folder, out of memory onto the disk."""
    if os.name == "posix":
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def write(path, fill):
    """Make a file. fill(partial) writes it under another name beside it, which is then renamed.
    Where that fails, the file that was there stays as it is."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        fill(partial)
        flush(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)  # there only where something failed
    flush(path.parent)


@contextmanager
def or_exit(path, hint=""):
    """Where the system refuses what is done in here, as on a full disk, the program exits 2 with a
    line about `path`."""
    try:
        yield
    except OSError as error:
        die(f"{path}: {error.strerror}{hint}")


def write_text(path, text):
    """Make a text file, and its folder; exits 2 where that cannot be done."""
    with or_exit(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write(path, lambda partial: partial.write_text(text, "utf-8", errors="replace"))


def read_pickle(path):
    """What torch.save wrote; ValueError says why it cannot be read. A pickle can hold code: such a
    file is refused, and nothing is run."""
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise ValueError("its contents are not what was written")  # torch.load does not look
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError("damaged, or it holds more than tensors, perhaps code: refused") from None
    except Exception as error:  # torch raises many kinds of error over a damaged file
        raise ValueError(f"not a whole file ({reason(error)})") from None


def read_tensors(path):
    """{name: tensor} of a file that torch.save wrote, as `read_pickle` reads it."""
    tensors = read_pickle(path)
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise ValueError("not a file of tensors by name")
    return {str(name): w for name, w in tensors.items()}


def lock(folder):
    """Make a stage's folder and lock it, so that a second run in it exits 2. The lock is the
    system's (flock): it ends with this process, even where that is killed."""
    folder = Path(folder)
    with or_exit(f"--out_dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        if rank() or folder.resolve() in _locked:
            return
        file = open(folder / ".lock", "w")  # noqa: SIM115
    hold(file, folder, "another run is writing there; wait for its end or choose another --out_dir")
    _locked[folder.resolve()] = file


def unlock(folder):
    """Let another run write to a stage's folder before this process ends."""
    if file := _locked.pop(Path(folder).resolve(), None):
        file.close()


def hold(file, path, why=""):
    """Lock an open file for as long as it is open. Where another process has it, exits 2 with
    `why`, or waits if there is none."""
    try:
        import fcntl  # here, as Windows has none

        fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if why else 0))
    except BlockingIOError:
        die(f"{path}: {why}")
    except (ImportError, OSError):
        warn(f"{path}: cannot be locked here; let no second run write to it")
