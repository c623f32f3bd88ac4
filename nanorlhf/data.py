"""Files -> examples: every format that can be read, and the split into training and validation."""

import gzip
import json
import os
import re
import zlib
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from nanorlhf.config import die, warn

END_OF_DOCUMENT = "<|endoftext|>"  # on a line of its own in a .txt file


def _lines(path):
    """(line number, line) of a text file, .gz or not; what cannot be read exits 2."""
    empty, number = True, 0
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                empty = empty and not line.strip()
                yield number, line.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        die(f"{path}:{number}: not UTF-8 text ({error.reason} at byte {error.start} of the line)")
    except (OSError, EOFError, zlib.error) as error:
        die(f"{path}: {getattr(error, 'strerror', None) or error}")
    if empty:
        die(f"{path}: the file is empty")


def read_records(paths):
    """Yields (source, object) for every line of .jsonl or .jsonl.gz files."""
    for path in paths:
        for number, line in _lines(path):
            if not line.strip():
                continue
            source = f"{path}:{number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                die(f"{source}: not JSON ({error})")
            if not isinstance(record, dict):
                die(f"{source}: expected an object, found {type(record).__name__}")
            yield source, record


def read_texts(paths):
    """Yields (key, text) for every document: .txt is cut at <|endoftext|> lines, and any object
    of DESIGN's formats is read as its text. Documents with one key belong in one split."""
    for path in paths:
        if ".jsonl" in Path(path).suffixes:
            for source, record in read_records([path]):
                text = _record_text(record, source)
                yield first_user_turn(record) or text, text
        else:
            lines = (line for _, line in _lines(path))
            for is_cut, part in groupby(lines, lambda line: line.strip() == END_OF_DOCUMENT):
                text = "".join(part).strip("\n")
                if text.strip() and not is_cut:
                    yield text, text


def _record_text(record, source):
    if "text" in record:
        return _string(record, "text", source)
    if "messages" in record:
        return "\n".join(content for _, content in _messages(record["messages"], source))
    if "chosen" in record and "prompt" not in record:
        return _string(record, "chosen", source).strip()
    prompt = _string(record, "prompt", source)
    for key in ("completion", "chosen"):
        if key in record:
            return prompt + "\n" + _string(record, key, source)
    return prompt


def first_user_turn(record):
    """What the split goes by; None for plain text."""
    if "messages" in record:
        return next((m.get("content") for m in record["messages"] if m.get("role") == "user"), None)
    if "prompt" not in record and "chosen" in record:
        turns = _hh_messages(record["chosen"])
        return next((content for role, content in turns if role == "user"), None)
    return record.get("prompt")


def is_held_out(first_turn):
    """The validation split: one in ten, by what the user said first. Never by pair or row: two
    rows about one prompt on both sides of a split inflate the accuracy that is measured."""
    return zlib.crc32(first_turn.encode("utf-8", errors="replace")) % 10 == 0


def _string(record, key, source):
    value = record.get(key)
    if not isinstance(value, str):
        found = ", ".join(map(repr, record)) or "nothing"
        die(f"{source}: needs a string {key!r}; found keys {found}")
    return value


def _messages(value, source):
    """A list of {"role", "content"} -> [(role, content)], roles "user" and "assistant"."""
    if not isinstance(value, list) or not value:
        die(f"{source}: 'messages' must be a list that is not empty")
    turns = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            die(f"{source}: a message needs a string 'content'")
        if message.get("role") not in ("user", "assistant"):
            die(f"{source}: role {message.get('role')!r}; known are 'user' and 'assistant'")
        turns.append((message["role"], message["content"]))
    return turns


def _hh_messages(text):
    """An HH-RLHF dialogue, "\\n\\nHuman: ...\\n\\nAssistant: ...", -> [(role, content)]."""
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [(roles[r], content.strip()) for r, content in zip(parts[1::2], parts[2::2])]


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


def load_demonstrations(paths):
    """SFT: {"prompt", "completion"}, {"messages"}, or the chosen dialogue of HH-RLHF."""
    examples = []
    for source, record in read_records(paths):
        if "messages" in record:
            messages = _messages(record["messages"], source)
        elif "chosen" in record and "prompt" not in record:
            messages = _hh_messages(_string(record, "chosen", source))
        else:
            completion = _string(record, "completion", source)
            messages = [("user", _string(record, "prompt", source)), ("assistant", completion)]
        if "assistant" not in [role for role, _ in messages]:
            die(f"{source}: no assistant turn to learn from")
        while messages[-1][0] != "assistant":
            messages.pop()
        examples.append(Example(messages, source))
    if empty := sum(not e.messages[-1][1] for e in examples):
        warn(f"{empty} of {len(examples)} completions are empty: only their end is learned")
    return examples


def load_prompts(paths):
    """PPO: {"prompt"}, or {"messages"} that end in a user turn."""
    examples = []
    for source, record in read_records(paths):
        if "messages" in record:
            messages = _messages(record["messages"], source)
        else:
            messages = [("user", _string(record, "prompt", source))]
        if messages[-1][0] != "user":
            die(f"{source}: a prompt must end in a user turn")
        examples.append(Example(messages, source))
    return examples


def load_feedback(paths):
    """RM: (kind, list of Feedback), kind one of "comparisons", "rankings", "ratings", "thumbs"."""
    examples, kinds, equal = [], {}, 0
    for source, record in read_records(paths):
        kind, messages, completions, target = _feedback(record, source)
        kinds.setdefault(kind, source)
        if len(kinds) > 1:
            (a, first), (b, _) = kinds.items()
            die(f"{source}: {b}, but {first} has {a}; one kind of feedback per run")
        labeler = str(record.get("labeler", ""))
        if kind == "comparisons" and completions[0] == completions[1]:
            equal += 1
            continue
        examples.append(Feedback(messages, source, completions, target, labeler))
    if equal:
        warn(f"{equal} comparisons of a text with itself left out")
    return next(iter(kinds)), examples


def _feedback(record, source):
    if "chosen" in record and "prompt" not in record:
        chosen, rejected = _string(record, "chosen", source), _string(record, "rejected", source)
        same = len(os.path.commonprefix([chosen, rejected]))
        turn = "\n\nAssistant:"
        cut = chosen.rfind(turn, 0, same)
        if cut < 0:
            die(f"{source}: chosen and rejected share no prompt that ends in {turn!r}")
        completions = [text[cut + len(turn) :].strip() for text in (chosen, rejected)]
        return "comparisons", _hh_messages(chosen[:cut]), completions, [1, 2]
    if isinstance(record.get("prompt"), list):
        messages = _messages(record["prompt"], source)
        if messages[-1][0] != "user":
            die(f"{source}: a prompt must end in a user turn")
    else:
        messages = [("user", _string(record, "prompt", source))]
    if "chosen" in record:
        completions = [_string(record, key, source) for key in ("chosen", "rejected")]
        return "comparisons", messages, completions, [1, 2]
    if "ranks" in record:
        texts, ranks = record.get("completions"), record["ranks"]
        if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
            die(f"{source}: 'completions' must be a list of strings")
        if not isinstance(ranks, list) or not all(type(r) is int and r > 0 for r in ranks):
            die(f"{source}: 'ranks' must be a list of integers, 1 for the best")
        if len(ranks) != len(texts) or len(ranks) < 2:
            die(f"{source}: {len(texts)} completions with {len(ranks)} ranks; needs 2 of each")
        # one text cannot be better than itself: equal texts get the best of their ranks
        tied = [min(r for r, t in zip(ranks, texts) if t == text) for text in texts]
        return "rankings", messages, texts, tied
    completion = [_string(record, "completion", source)]
    if "rating" in record:
        rating = record["rating"]
        if type(rating) not in (int, float) or not 0 <= rating <= 5:
            die(f"{source}: 'rating' must be a number from 0 to 5, found {rating!r}")
        return "ratings", messages, completion, [float(rating)]
    if record.get("label") not in (True, False, 0, 1):
        die(f"{source}: needs 'chosen', 'ranks', 'rating' or a true/false 'label'")
    return "thumbs", messages, completion, [float(record["label"])]


def write_records(path, records):
    """Objects -> a .jsonl file; returns its path as a string."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    except OSError as error:
        die(f"{path}: {error.strerror}")
    return str(path)
