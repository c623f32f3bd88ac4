"""Files that are whole and on the disk, or not there.

A name is given to a file or a folder only when its contents are complete and flushed, by a rename,
which happens or does not. A checkpoint carries SHA256SUMS, in the format of the command sha256sum,
so that a bit that flipped later is noticed too.
"""

import hashlib
import os
import shutil
from pathlib import Path

SUMS = "SHA256SUMS"


def digest(path):
    """The sha256 of a file's contents."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path):
    """Out of the system's memory, onto the disk: a file's contents, or the names in a folder."""
    if os.name != "posix" and Path(path).is_dir():
        return  # Windows has no such call for a folder
    fd = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write(path, fill):
    """Make a file by fill(path of another name beside it), then give it its own name."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    fill(partial)
    flush(partial)
    os.replace(partial, path)
    flush(path.parent)


def seal(folder):
    """Add SHA256SUMS to a complete folder and flush all of it."""
    names = sorted(p.name for p in folder.iterdir() if p.name != SUMS)
    lines = "".join(f"{digest(folder / name)}  {name}\n" for name in names)
    (folder / SUMS).write_text(lines)
    for path in (*folder.iterdir(), folder):
        flush(path)


def swap(partial, target):
    """Give a sealed folder its name, in the place of an older one of that name, if there is one.
    Between the two renames there is none: `replaced(target)` is the older one then."""
    aside = replaced(target)
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        target.rename(aside)
    partial.rename(target)
    flush(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def replaced(target):
    return target.with_name(f".{target.name}.replaced")


def damage(folder, names):
    """What is wrong with files of a sealed folder, in words; "" if nothing is. A folder without
    SHA256SUMS, of another program, cannot be checked."""
    try:
        lines = (folder / SUMS).read_text().splitlines()
    except FileNotFoundError:
        return ""
    except (OSError, ValueError):
        return f"{SUMS} cannot be read"
    sums = {name: found for found, _, name in (line.partition("  ") for line in lines)}
    for name in names:
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sums.get(name) != digest(folder / name):
            return f"{name} is damaged, its contents are not what was written"
    return ""
