"""The file of people's answers, which grows by one answer at a time.

An answer is on the disk before the person hears that it is kept. A comparison or a ranking is one
line; ratings and thumbs are one line for each response. Beside the keys of a feedback record (see
docs/data.md) a line holds

    judgement_id, labeler     which question, to whom
    models, seed              who wrote each response, or a list of all who wrote it; which seed
    seconds, time             how long the answer took, and when it was given
    repeat_of                 the id under which the same question was asked before

A question that was skipped leaves {"judgement_id", "labeler", "skipped": true}, and an answer that
was taken back is followed by {"judgement_id", "labeler", "undone": true}. Every reader of feedback
goes by these two. Equal texts of several models were shown to nobody: they are skipped, too, but
with the ranks of a tie, for `agreement`.
"""

import json
import os
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock

from nanorlhf.config import die, warn
from nanorlhf.data.files import read_records
from nanorlhf.machine.durable import hold, or_exit

# kind -> (key of a record, types of its value, lowest, highest, what an answer must be); a rank is
# at most how many responses there are
KINDS = {
    "comparisons": ("ranks", [int], 1, 2, "0 or 1, the better response, or -1 for a tie"),
    "rankings": ("ranks", [int], 1, None, "a list of ranks, 1 for the best"),
    "ratings": ("rating", [int, float], 0, 5, "a list of numbers from 0 to 5"),
    "thumbs": ("label", [bool], 0, 1, "a list of true and false"),
}


BETTER = {"[1, 2]": "reply 1 is better", "[2, 1]": "reply 2 is better", "[1, 1]": "a tie"}
WORDS = BETTER | {"None": "a skip", "True": "like", "False": "dislike"}


class Refused(Exception):
    """An answer that cannot be taken: an HTTP status, and why."""

    def __init__(self, status, why):
        super().__init__(why)
        self.status = status


class Journal:
    """The file of one kind of answers, locked for this process, and who has answered what."""

    def __init__(self, path, kind):
        self.path, self.lock = Path(path), Lock()
        self.key = KINDS[kind][0]
        self.ids = defaultdict(dict)  # labeler -> {id: values of an answer or [None]}, latest last
        if self.path.suffix != ".jsonl":
            die(f"{path}: the name of a feedback file must end in .jsonl")
        with or_exit(path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        hold(self.fd, path, "another program is writing to it; --to names another file")
        text = self.path.read_bytes()
        half_a_line = text[text.rfind(b"\n") + 1 :]
        if half_a_line.startswith(b'{"judgement_id"'):  # a loss of power leaves that
            warn(f"{path}: its last answer was never finished, and is removed")
            os.ftruncate(self.fd, len(text) - len(half_a_line))
        for source, record in read_records([path]) if os.fstat(self.fd).st_size else ():
            is_kind = {"skipped", "undone", self.key} & record.keys()
            if not is_kind or not {"judgement_id", "labeler"} <= record.keys():
                die(f"{source}: not one of the {kind} made here; --to names another file")
            self.remember(record)

    def remember(self, record):
        ids = self.ids[record["labeler"]]
        values = ids.pop(record["judgement_id"], [])
        if not record.get("undone"):
            ids[record["judgement_id"]] = [*values, record.get(self.key)]

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


def records_of(kind, prompt, responses, models, answer):
    """The feedback records of an answer to responses, of which None skips them; Refused where it is
    no answer."""
    if answer is None:
        return [{"prompt": prompt, "skipped": True}]
    key, types, low, high, words = KINDS[kind]
    values, n = answer, len(responses)
    if kind == "comparisons":
        values = {0: [1, 2], 1: [2, 1], -1: [1, 1]}.get(answer) if type(answer) is int else None
    is_list = isinstance(values, list) and len(values) == n
    if not is_list or not all(type(x) in types and low <= x <= (high or n) for x in values):
        raise Refused(400, f"the answer must be {words}")
    if key == "ranks":
        return [{"prompt": prompt, "completions": responses, "ranks": values, "models": models}]
    return [
        {"prompt": prompt, "completion": text, key: value, "models": [model]}
        for text, value, model in zip(responses, values, models)
    ]


def in_words(values):
    """What an answer said, by the values in its records; ranks and stars in the order shown."""
    return ", ".join(WORDS.get(str(value), str(value).strip("[]")) for value in values)
