"""What people have said: a feedback file that grows by one answer at a time.

An answer is on the disk before its giver hears that it is. It is one record, or one for each
response where these are rated one by one, in the keys of data/values.py, and beside them

    judgement_id, labeler     which question, to whom
    models, seed              who wrote the responses, with which seed
    seconds, time             how long it took, and when it was given
    part                      [k, n]: the k-th record of the n of one answer
    repeat_of                 the id of the same question, asked before

A question that was skipped leaves {"judgement_id", "labeler", "skipped": true}, an answer that was
taken back {"judgement_id", "labeler", "undone": true}; `standing` in data/examples.py, and so every
reader of feedback, goes by it.
"""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock

from nanorlhf.config import die, reason, warn
from nanorlhf.data.files import read_records
from nanorlhf.machine.process import hold


class Refused(Exception):
    """An answer that cannot be taken: an HTTP status, and why."""

    def __init__(self, status, why):
        super().__init__(why)
        self.status = status


class Journal:
    """The file, locked for this process, and who has answered what in it."""

    def __init__(self, path, kind):
        self.path, self.lock, self.answers = Path(path), Lock(), {}  # labeler -> {id: None}
        if self.path.suffix != ".jsonl":
            die(f"{path}: the name of a feedback file must end in .jsonl")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            die(f"{path}: {reason(error)}")
        hold(self.fd, path, "another program is writing to it; --to names another file")
        self.cut_unfinished()
        self.size = os.fstat(self.fd).st_size
        for source, record in read_records([path]) if self.size else []:
            check(source, record, kind)
            self.remember(record)

    def cut_unfinished(self):
        """Remove what a killed program, or a full disk, left half written at the end of our file: a
        part of a line, or some of the records of one answer. It was never confirmed."""
        text = self.path.read_bytes()
        if not text.startswith(b'{"judgement_id"'[: len(text) or 1]):
            return  # not ours: `check` says so, and it stays as it is
        lines = text.splitlines(keepends=True)
        if not lines[-1].endswith(b"\n"):
            lines.pop()
        if lines and (n := unfinished(lines[-1])):
            del lines[-n:]
        if (whole := sum(map(len, lines))) < len(text):
            warn(f"{self.path}: its last answer was never finished, and is removed")
            os.ftruncate(self.fd, whole)

    def remember(self, record):
        given = self.answers.setdefault(record["labeler"], {})
        if record.get("undone"):
            given.pop(record["judgement_id"], None)
        else:
            given[record["judgement_id"]] = None

    def given(self, labeler):
        """The ids that a labeler has answered or skipped, the latest last."""
        return list(self.answers.get(labeler, ()))

    def write(self, labeler, id, records):
        """Append the records of an answer, on the disk when this returns; Refused, and the file is
        as it was, where that cannot be done. The caller holds the lock."""
        head, n = {"judgement_id": id, "labeler": labeler}, len(records)
        tail = {"time": datetime.now(UTC).isoformat(timespec="seconds")}
        parts = [{"part": (i, n)} if n > 1 else {} for i in range(1, n + 1)]
        lines = [json.dumps(head | r | tail | part) + "\n" for r, part in zip(records, parts)]
        lines = "".join(lines).encode()
        try:
            if not os.path.samestat(os.stat(self.path), os.fstat(self.fd)):
                raise OSError(0, "the file was replaced; start this program again")
            if os.write(self.fd, lines) < len(lines):
                raise OSError(0, "no room on the disk")
            os.fsync(self.fd)
        except OSError as error:
            os.ftruncate(self.fd, self.size)
            raise Refused(507, f"not saved: {error.strerror}") from None
        self.size += len(lines)
        for record in records:
            self.remember(head | record)


def unfinished(line):
    """How many records, this last one among them, are of an answer that lacks some. A broken line
    is for `read_records` to name."""
    try:
        record = json.loads(line)
    except ValueError:
        return 0
    match record:
        case {"part": [int(k), int(n)]} if 0 < k < n:
            return k
    return 0


def check(source, record, kind):
    """Exits 2 where a record is not of a file that answers of this kind can be added to."""
    if not {"judgement_id", "labeler"} <= record.keys():
        die(f"{source}: holds no judgement made here; --to names another file")
    column = {"ratings": "rating", "thumbs": "label"}.get(kind, "ranks")
    if not {"skipped", "undone", column} & record.keys():
        die(f"{source}: another kind of judgement than {kind}; --to names another file")
