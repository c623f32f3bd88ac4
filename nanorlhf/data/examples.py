"""Files -> examples: what each stage takes from a record, and the split into training and held out.

files.py reads the files, and shapes.py knows the shapes of records.
"""

import json
import math
import zlib
from dataclasses import dataclass, field
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
    """Yields (source, shape, record in the keys of shapes.py, and `columns`: the published one)."""
    n_empty = 0
    for source, published in read_records(paths, columns):
        shape, record = recognise(published, source)
        if record is None:
            n_empty += 1
        else:
            yield source, shape, record | {"columns": published}
    if n_empty:
        warn(f"{n_empty} records with nothing in them left out")


def is_records(path):
    """Whether a file holds records; else it is plain text."""
    return format_of(path) in READERS


def read_texts(paths, columns=()):
    """Yields (key, text) for every document. Plain text is cut at its <|endoftext|> lines, and any
    record is read as its text. Documents with the same key belong in the same split."""
    for path in paths:
        if is_records(path):
            for source, _, record in read([path], columns):
                text = record_text(record)
                if text is None:
                    die(f"{source}: no text in it")
                yield first_user_turn(record) or text, text
        else:
            unnumbered = (line for _, line in lines(path))
            for is_end, group in groupby(unnumbered, lambda line: line.strip() == END_OF_DOCUMENT):
                text = "".join(group).strip("\n")
                if text.strip() and not is_end:
                    yield text, text


def record_text(record):
    """A record as plain text; None where it has none."""
    if "text" in record:
        return record["text"]
    messages = demonstration(record) or record.get("prompt")
    return "\n".join(content for _, content in messages) if messages else None


def demonstration(record):
    """The dialogue of a record that can be imitated: its messages, or its prompt with the only,
    the chosen or the best completion. None where it has none of these."""
    if "messages" in record:
        return record["messages"]
    reply = record.get("completion", record.get("chosen"))
    if reply is None and "ranks" in record:
        best = record["ranks"].index(min(record["ranks"]))
        reply = record["completions"][best]
    return None if reply is None else [*record["prompt"], ("assistant", reply)]


def first_user_turn(record):
    """What the user says first, by which the split is made; None for plain text."""
    messages = record.get("messages") or record.get("prompt") or []
    return next((content for role, content in messages if role == "user"), None)


def is_held_out(first_turn):
    """Whether a prompt is one of the tenth that is held out. The split goes by prompt, never by
    pair or row: with one prompt on both sides, the measured accuracy is too high."""
    return zlib.crc32(first_turn.encode("utf-8", errors="replace")) % 10 == 0


def split_held_out(examples, val_examples, limit=None):
    """(training, validation): as given, or where no validation examples are given, by
    `is_held_out`. Exits 2 where one is empty. `limit`: keep the first so many validation examples,
    which of a large data set are enough to see where training stands."""
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
    columns: dict = field(default_factory=dict, kw_only=True)  # of the file, under their new names

    @property
    def first_turn(self):
        return next((content for role, content in self.messages if role == "user"), "")


@dataclass
class Feedback(Example):
    """A labeler's judgement of completions of one prompt."""

    completions: list
    target: list  # a rank for each completion, 1 is best; or one rating (0..5) or label (0 or 1)
    labeler: str


def load_demonstrations(paths, columns=()):
    """SFT: dialogues up to the last assistant turn; see `demonstration`."""
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
        examples.append(Example(messages, source, columns=record["columns"]))
    return examples


def load_feedback(paths, columns=()):
    """RM: (kind, list of Feedback), kind one of "comparisons", "rankings", "ratings", "thumbs"."""
    examples, n_equal = [], 0
    first_kind, first_source = None, None
    for source, shape, record in read(paths, columns):

        def refuse(reason):
            die(f"{source}: read as {shape.name!r}: {reason}")

        kind, completions, target = judgement(record, refuse)
        if first_kind is None:
            first_kind, first_source = kind, source
        if kind != first_kind:
            die(
                f"{source}: {kind}, but {first_source} has {first_kind}; "
                "one kind of feedback per run"
            )
        if kind == "comparisons" and completions[0] == completions[1]:
            n_equal += 1
            continue
        labeler = record.get("labeler", "")
        examples.append(Feedback(record["prompt"], source, completions, target, labeler))
    if n_equal:
        warn(f"{n_equal} comparisons of a text with itself left out")
    if not examples:
        die(f"{paths[0]}: nothing to compare in it")
    return first_kind, examples


def judgement(record, refuse):
    """(kind, completions, target) of a record. Where it has no judgement, refuse(reason) is called,
    which must not return."""
    if "chosen" in record and "rejected" in record and "prompt" in record:
        return "comparisons", [record["chosen"], record["rejected"]], [1, 2]
    if "ranks" in record:
        completions, ranks = record["completions"], record["ranks"]
        best = {}  # text -> the best of its ranks: a text given twice is not better than itself
        for text, rank in zip(completions, ranks):
            best[text] = min(rank, best.get(text, rank))
        return "rankings", completions, [best[text] for text in completions]
    if "completion" in record and "rating" in record:
        try:
            rating = math.nan if record["rating"] is True else float(record["rating"])
        except (TypeError, ValueError, OverflowError):
            rating = math.nan  # within no limits
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
    """Write dicts as a .jsonl file; returns its path as a string."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        durable.write(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    except OSError as error:
        die(f"{path}: {error.strerror}")
    return str(path)
