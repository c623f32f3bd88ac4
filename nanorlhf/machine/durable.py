"""Files that are whole and on the disk, or not there at all.

A file or folder is written under another name first. Once it is complete and on the disk, a rename
gives it its own name, and a rename is never half done. A checkpoint carries SHA256SUMS, in the
format of the command sha256sum, by which a later flip of a bit is noticed too.
"""

import hashlib
import os
import shutil
from pathlib import Path

from nanorlhf.config import die

SUMS = "SHA256SUMS"


def digest(path):
    """The sha256 of a file's contents."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path):
    """Force a file's contents, or the names in a folder, out of memory onto the disk."""
    if os.name != "posix" and Path(path).is_dir():
        return  # Windows has no such call for a folder
    fd = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
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
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


def write_text(path, text):
    """Make a text file, and its folder; exits 2 where that cannot be done."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write(path, lambda partial: partial.write_text(text, "utf-8", errors="replace"))
    except OSError as error:
        die(f"{path}: {error.strerror}")


def seal(folder):
    """Add SHA256SUMS to a folder whose files are complete, and flush all of them."""
    names = sorted(p.name for p in folder.iterdir() if p.name != SUMS)
    lines = "".join(f"{digest(folder / name)}  {name}\n" for name in names)
    (folder / SUMS).write_text(lines)
    for path in (*folder.iterdir(), folder):
        flush(path)


def swap(partial, target):
    """Give a sealed folder its name, and remove an older folder of that name. A program that is
    killed between the two renames leaves none of that name; the older one is at
    `replaced(target)` then."""
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
    """What is wrong with these files of a sealed folder, in words; "" if nothing is, or if the
    folder has no SHA256SUMS by which to tell."""
    try:
        lines = (folder / SUMS).read_text().splitlines()
    except FileNotFoundError:
        return ""
    except (OSError, ValueError):
        return f"{SUMS} cannot be read"
    sums = {}  # a file's name -> its digest when it was written
    for line in lines:
        written, _, name = line.partition("  ")
        sums[name] = written
    for name in names:
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sums.get(name) != digest(folder / name):
            return f"{name} is damaged, its contents are not what was written"
    return ""
