"""Files -> examples: what each stage takes from a record, and the split into training and held out.

How files are read, and which shapes of records are known, is in formats/.
"""

import json
import math
import zlib
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from nanorlhf.config import die, warn
from nanorlhf.data.files import READERS, format_of, lines, read_records
from nanorlhf.data.shapes import recognise
from nanorlhf.machine import durable

END_OF_DOCUMENT = "<|endoftext|>"  # on a line of its own in a .txt file
LABELS = {
    "1": 1.0,
    "true": 1.0,
    "positive": 1.0,
    "like": 1.0,
    "0": 0.0,
    "false": 0.0,
    "negative": 0.0,
    "dislike": 0.0,
}


def read(paths, columns=()):
    """Yields (source, shape, record in the keys of formats/shapes.py)."""
    empty = 0
    for source, record in read_records(paths, columns):
        shape, found = recognise(record, source)
        if found is None:
            empty += 1
        else:
            yield source, shape, found
    if empty:
        warn(f"{empty} records with nothing in them left out")


def is_records(path):
    """Records, or plain text?"""
    return format_of(path) in READERS


def read_texts(paths, columns=()):
    """Yields (key, text) for every document: .txt is cut at <|endoftext|> lines, and any record
    is read as its text. Documents with one key belong in one split."""
    for path in paths:
        if is_records(path):
            for source, _, record in read([path], columns):
                found = record_text(record)
                if found is None:
                    die(f"{source}: no text in it")
                yield first_user_turn(record) or found, found
        else:
            found = (line for _, line in lines(path))
            for is_cut, part in groupby(found, lambda line: line.strip() == END_OF_DOCUMENT):
                text = "".join(part).strip("\n")
                if text.strip() and not is_cut:
                    yield text, text


def record_text(record):
    """A record as plain text; None where it has none."""
    if "text" in record:
        return record["text"]
    messages = demonstration(record) or record.get("prompt")
    return "\n".join(content for _, content in messages) if messages else None


def demonstration(record):
    """What can be imitated: the messages, or the prompt with its completion, the chosen or the
    best one; None where nothing is."""
    if "messages" in record:
        return record["messages"]
    reply = record.get("completion", record.get("chosen"))
    if reply is None and "ranks" in record:
        reply = max(zip(record["ranks"], record["completions"]), key=lambda x: -x[0])[1]
    return None if reply is None else [*record["prompt"], ("assistant", reply)]


def first_user_turn(record):
    """What the split goes by; None for plain text."""
    messages = record.get("messages") or record.get("prompt") or []
    return next((content for role, content in messages if role == "user"), None)


def is_held_out(first_turn):
    """The validation split: one in ten, by what the user said first. Never by pair or row: two
    rows about one prompt on both sides of a split inflate the accuracy that is measured."""
    return zlib.crc32(first_turn.encode("utf-8", errors="replace")) % 10 == 0


def split_held_out(examples, val_examples, limit=None):
    """(training, validation) by `is_held_out`, or as given; neither may be empty. Of a large
    data set the first `limit` held-out examples are enough to see where training stands."""
    if not val_examples:
        val_examples = [e for e in examples if is_held_out(e.first_turn)]
        examples = [e for e in examples if not is_held_out(e.first_turn)]
    if not examples or not val_examples:
        die(
            f"{len(examples)} examples to train on and {len(val_examples)} held out (one prompt in "
            "ten, by its hash): give more data, or --val_data"
        )
    return examples, val_examples[:limit]


@dataclass
class Example:
    """A dialogue: for SFT it ends with the assistant, for PPO with the user."""

    messages: list  # [(role, content)]
    source: str

    @property
    def first_turn(self):
        return next((content for role, content in self.messages if role == "user"), "")


@dataclass
class Feedback(Example):
    """A labeler's judgement of completions of one prompt: ranks (1 is best) or one number."""

    completions: list
    target: list
    labeler: str


def load_demonstrations(paths, columns=()):
    """SFT: dialogues that end with the assistant; see `demonstration`."""
    examples = []
    for source, shape, record in read(paths, columns):
        messages = list(demonstration(record) or [])
        while messages and messages[-1][0] != "assistant":
            messages.pop()
        if not messages:
            die(
                f"{source}: read as {shape.name!r}: no assistant turn to learn from; needs "
                "'messages', or a 'prompt' with a 'completion' or 'chosen'"
            )
        examples.append(Example(messages, source))
    if empty := sum(not e.messages[-1][1] for e in examples):
        warn(f"{empty} of {len(examples)} completions are empty: only their end is learned")
    return examples


def load_prompts(paths, columns=()):
    """PPO: dialogues up to the last user turn."""
    examples = []
    for source, shape, record in read(paths, columns):
        messages = list(record.get("prompt") or record.get("messages") or [])
        while messages and messages[-1][0] != "user":
            messages.pop()
        if not messages:
            die(f"{source}: read as {shape.name!r}: no 'prompt' and no user turn to answer")
        examples.append(Example(messages, source))
    return examples


def load_feedback(paths, columns=()):
    """RM: (kind, list of Feedback), kind one of "comparisons", "rankings", "ratings", "thumbs"."""
    examples, kinds, equal = [], {}, 0
    for source, shape, record in read(paths, columns):
        refuse = lambda reason: die(f"{source}: read as {shape.name!r}: {reason}")
        kind, completions, target = judgement(record, refuse)
        kinds.setdefault(kind, source)
        if len(kinds) > 1:
            (a, first), (b, _) = kinds.items()
            die(f"{source}: {b}, but {first} has {a}; one kind of feedback per run")
        labeler = record.get("labeler", "")
        if kind == "comparisons" and completions[0] == completions[1]:
            equal += 1
            continue
        examples.append(Feedback(record["prompt"], source, completions, target, labeler))
    if equal:
        warn(f"{equal} comparisons of a text with itself left out")
    if not examples:
        die(f"{paths[0]}: nothing to compare in it")
    return next(iter(kinds)), examples


def judgement(record, refuse):
    """(kind, completions, target) of a record; refuse(reason) ends the program."""
    if "chosen" in record and "rejected" in record and "prompt" in record:
        return "comparisons", [record["chosen"], record["rejected"]], [1, 2]
    if "ranks" in record:
        texts, ranks = record["completions"], record["ranks"]
        # one text cannot be better than itself: equal texts get the best of their ranks
        return "rankings", texts, [min(r for r, t in zip(ranks, texts) if t == x) for x in texts]
    if "completion" in record and "rating" in record:
        try:
            rating = math.nan if record["rating"] is True else float(record["rating"])
        except (TypeError, ValueError, OverflowError):
            rating = math.nan
        if not 0 <= rating <= 5:
            refuse(f"'rating' must be a number from 0 to 5, found {record['rating']!r}")
        return "ratings", [record["completion"]], [rating]
    label = str(record.get("label")).lower()
    if "completion" not in record or label not in LABELS:
        refuse(
            "no judgement in it; needs 'chosen' and 'rejected', 'completions' and 'ranks', or "
            f"a 'completion' with a 'rating' or a 'label' ({', '.join(LABELS)})"
        )
    return "thumbs", [record["completion"]], [LABELS[label]]


def write_records(path, records):
    """Objects -> a .jsonl file; returns its path as a string."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        durable.write(path, lambda partial: partial.write_text(lines, encoding="utf-8"))
    except OSError as error:
        die(f"{path}: {error.strerror}")
    return str(path)
