"""The file of people's answers, which grows by one answer at a time.

An answer is on the disk before the person hears that it is kept. A comparison or a ranking is one
line; ratings and thumbs are one line for each response. Beside the keys of a feedback record (see
docs/data.md) a line holds

    judgement_id, labeler     which question, to whom
    models, seed              who wrote the responses, with which seed
    seconds, time             how long the answer took, and when it was given
    repeat_of                 the id under which the same question was asked before

A question that was skipped leaves {"judgement_id", "labeler", "skipped": true}, and an answer that
was taken back is followed by {"judgement_id", "labeler", "undone": true}. Every reader of feedback
goes by these two.
"""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock

from nanorlhf.config import die, reason, warn
from nanorlhf.machine.durable import hold


class Refused(Exception):
    """An answer that cannot be taken: an HTTP status, and why."""

    def __init__(self, status, why):
        super().__init__(why)
        self.status = status


class Journal:
    """The file of one kind of answers, locked for this process, and who has answered what."""

    def __init__(self, path, kind):
        self.path, self.lock, self.ids = Path(path), Lock(), {}  # labeler -> {id: None}, in order
        if self.path.suffix != ".jsonl":
            die(f"{path}: the name of a feedback file must end in .jsonl")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            die(f"{path}: {reason(error)}")
        hold(self.fd, path, "another program is writing to it; --to names another file")
        self.cut_half_a_line()
        for number, line in enumerate(self.path.read_bytes().splitlines(), 1):
            if line.strip():
                self.remember(checked(f"{path}:{number}", line, kind))

    def cut_half_a_line(self):
        """Remove half a line at the end, which the loss of power leaves. Its answer was never
        confirmed. In a file of somebody else's, which `checked` refuses, it stays."""
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text and text.startswith(b'{"judgement_id"'[: len(text)]):
            warn(f"{self.path}: its last answer was never finished, and is removed")
            os.ftruncate(self.fd, len(whole))

    def remember(self, record):
        ids = self.ids.setdefault(record["labeler"], {})
        if record.get("undone"):
            ids.pop(record["judgement_id"], None)
        else:
            ids[record["judgement_id"]] = None

    def answered_by(self, labeler):
        """The ids that a labeler has answered or skipped, the latest last."""
        return list(self.ids.get(labeler, ()))

    def write(self, labeler, id, records):
        """Append the records of an answer, on the disk when this returns; Refused, and the file is
        as it was, where that cannot be done. The caller holds the lock."""
        head = {"judgement_id": id, "labeler": labeler}
        time = {"time": datetime.now(UTC).isoformat(timespec="seconds")}
        lines = "".join(json.dumps(head | record | time) + "\n" for record in records).encode()
        size = os.fstat(self.fd).st_size
        try:
            if not os.path.samestat(os.stat(self.path), os.fstat(self.fd)):
                raise OSError(0, "the file was replaced; start this program again")
            if os.write(self.fd, lines) < len(lines):
                raise OSError(0, "no room on the disk")
            os.fsync(self.fd)
        except OSError as error:
            os.ftruncate(self.fd, size)
            raise Refused(507, f"not saved: {error.strerror}") from None
        for record in records:
            self.remember(head | record)


def checked(source, line, kind):
    """The record of a line; exits 2 where it is none that answers of this kind can stand beside."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not {"judgement_id", "labeler"} <= record.keys():
        die(f"{source}: no judgement made here; --to names another file")
    key = {"ratings": "rating", "thumbs": "label"}.get(kind, "ranks")
    if not {"skipped", "undone", key} & record.keys():
        die(f"{source}: another kind of judgement than {kind}; --to names another file")
    return record
