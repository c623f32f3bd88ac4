"""Files -> examples: what each stage takes from a record, and the split into training and held out.

files.py reads the files, and shapes.py knows the shapes of records.
"""

import json
import math
import re
import zlib
from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby

from nanorlhf.config import die, note, once, warn
from nanorlhf.data.files import READERS, format_of, lines, read_records
from nanorlhf.data.shapes import Unknown, in_trees, recognise, standing
from nanorlhf.data.values import Misfit, as_turns
from nanorlhf.machine import durable

END_OF_DOCUMENT = "<|endoftext|>"  # on a line of its own in a .txt file
LIKE, DISLIKE = "1 1.0 true positive like".split(), "0 0.0 false negative dislike".split()
NEEDS = {  # stage -> the columns that it asks for
    "gpt": "text",
    "sft": "'messages', or a 'prompt' with a 'completion' or 'chosen'",
    "rm": "prompt, chosen and rejected; or prompt, completions and ranks; or prompt, completion "
    "and a rating (0 to 5) or a label (like or dislike)",
    "ppo": "prompt; or messages",
}
# what judgements are called
JUDGEMENT = re.compile(
    r"(?i)chosen|reject|prefer|winner|better|rank|scor|rating|label|safe|judg|vote"
    r"|(answer|response|reply|completion|output)(s$|_?([0-9]|[ab]$))"
)
# what separates texts and turns in the templates of several models
MARKS = re.compile(r"<\|\w+\|>|</s>|\[/?INST\]|<(?:start|end)_of_turn>")


def read(paths, stage, make, columns=(), skip=0):
    """Yields make(source, record) for every record, in the keys of shapes.py and with its `shape`
    and its published `columns`; None from `make`, which has counted it, is left out. Up to `skip`
    records that cannot be used are left out, too: the next one exits 2. What a file holds and
    nobody uses is named at its end."""
    misfits, n_empty = [], 0
    for path in paths:
        unused, kinds, marks = set(), set(), Counter()
        for source, published in standing(in_trees(read_records([path], columns))):
            try:
                shape, record, left = recognise(published, columns)
                if record is None:
                    n_empty += 1
                    continue
                made = make(source, record | {"shape": shape, "columns": published})
            except Misfit as misfit:
                misfits.append(f"{source}: {misfit}")
                if len(misfits) > skip:
                    die(misfits[-1] + (advice(stage) if isinstance(misfit, Unknown) else ""))
                continue
            unused |= left
            kinds.add(kind_of(record))
            marks.update(MARKS.findall(str(published)))
            if made is not None:
                yield made
        tell(path, stage, unused, kinds - {None})
        tell_marks(path, marks)
    if n_empty:
        once(warn, f"{n_empty} records with nothing in them left out")
    if misfits:
        once(warn, f"{len(misfits)} records that cannot be used left out, the first: {misfits[0]}")


def advice(stage):
    asked = [f"train_{name}.py needs {what}" for name, what in NEEDS.items() if stage in ("", name)]
    return f". Name them, as in --columns prompt=my_question; {'. '.join(asked)}"


def tell(path, stage, unused, kinds):
    """Say what of a file is not used."""
    doubtful, kinds = sorted(filter(JUDGEMENT.search, unused)), ", ".join(sorted(kinds))
    if doubtful and not kinds:
        names, unused = ", ".join(doubtful), unused - set(doubtful)
        once(warn, f"{path}: not used, and may be a judgement: {names}; see --columns")
    if kinds and stage in ("gpt", "sft", "ppo"):
        once(warn, f"{path} holds {kinds}; train_{stage}.py sees at most which reply is better")
    if unused:
        what = "left to --reward and --gold" if stage == "ppo" else "not used"
        once(note, f"{path}: columns {what}: {', '.join(sorted(unused))}")


def tell_marks(path, marks):
    if marks:
        spelled = ", ".join(f"{mark} {n:,} times" for mark, n in marks.most_common())
        once(warn, f"{path}: text spells {spelled}: read as characters, and not as separators")


def is_records(path):
    """Whether a file holds records; else it is plain text."""
    return format_of(path) in READERS


def read_texts(paths, columns=(), skip=0):
    """Yields (key, text) for every document. Plain text is cut at its <|endoftext|> lines, and any
    record is read as its text. Documents with the same key belong in the same split."""

    def make(source, record):
        text = record_text(record)
        if text is None:
            raise Misfit("no text in it")
        return first_user_turn(record.get("messages") or record.get("prompt") or []) or text, text

    for path in paths:
        if is_records(path):
            yield from read([path], "gpt", make, columns, skip)
            continue
        marks, unnumbered = Counter(), (line for _, line in lines(path))
        for is_end, group in groupby(unnumbered, lambda line: line.strip() == END_OF_DOCUMENT):
            text = "".join(group).strip("\n")
            if text.strip() and not is_end:
                marks.update(MARKS.findall(text))
                yield text, text
        tell_marks(path, marks)


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
    return None if reply is None else [*record["prompt"], *as_turns(reply)]


def first_user_turn(messages):
    """What the user says first, by which the split is made; "" where the user says nothing."""
    return next((content for role, content in messages if role == "user" and content), "")


def is_held_out(first_turn):
    """Whether a prompt is one of the tenth that is held out. The split goes by prompt, never by
    pair or row: with one prompt on both sides, the measured accuracy is too high."""
    return first_turn != "" and crc32(first_turn) % 10 == 0


def crc32(text):
    return zlib.crc32(text.encode("utf-8", errors="replace"))


def fold_of(first_turn, n):
    """Which of n parts a prompt is in, where each part is held out in turn."""
    return crc32("fold" + first_turn) % n


def held_out_prompts(examples):
    """The first turns that are held out of these: by `is_held_out`; of few, of which that takes all
    or none, the tenth with the lowest hashes, but one at least."""
    prompts = {e.first_turn for e in examples}
    held_out = set(filter(is_held_out, prompts))
    if len(held_out) in (0, len(prompts)) and len(prompts) > 1:
        by_hash = sorted(prompts, key=lambda prompt: (crc32(prompt), prompt))
        held_out = set(by_hash[: max(1, len(prompts) // 10)])
    return held_out


def split_held_out(examples, val_examples):
    """(training, validation): as given, or where no validation examples are given, by
    `held_out_prompts`. Exits 2 where one side is empty."""
    if not val_examples:
        held_out = held_out_prompts(examples)
        val_examples = [e for e in examples if e.first_turn in held_out]
        examples = [e for e in examples if e.first_turn not in held_out]
    if not examples or not val_examples:
        die(
            f"{len(examples)} examples to train on and {len(val_examples)} held out (one prompt in "
            "ten, by its hash): give more data, or --val_data"
        )
    return examples, val_examples


@dataclass
class Example:
    """A dialogue: for SFT it ends with the assistant, for PPO with the user."""

    messages: list  # [(role, content)]
    source: str
    columns: dict = field(default_factory=dict, kw_only=True)  # of the file, under their new names

    @property
    def first_turn(self):
        """What the split goes by. Where the user says nothing, dialogues would all be one, so it is
        everything that is said."""
        return first_user_turn(self.messages) or "\n".join(words for _, words in self.said())

    def said(self):
        return self.messages


@dataclass
class Feedback(Example):
    """A labeler's judgement of completions of one prompt."""

    completions: list  # replies: text, or turns where one goes on over several
    target: list  # a rank for each completion, 1 is best; or one rating (0..5) or label (0 or 1)
    labeler: str

    def said(self):
        return self.messages + [turn for reply in self.completions for turn in as_turns(reply)]


def load_demonstrations(paths, columns=(), skip=0, disliked="refuse"):
    """SFT: dialogues up to the last assistant turn that is learned; see `demonstration`. `disliked`
    says what becomes of replies that a person disliked: "refuse", "skip" or "learn"."""
    counts = Counter()

    def make(source, record):
        if kind_of(record) == "thumbs" and not like(record["label"]) and disliked != "learn":
            if disliked == "refuse":
                raise Misfit("a disliked reply: --disliked skip leaves such replies out, learn not")
            counts["disliked replies left out"] += 1
            return None
        dialogue = demonstration(record) or []
        messages = list(dialogue)
        while messages and messages[-1][0] != "assistant":
            messages.pop()
        n_unlearned = sum(role == "unlearned" for role, _ in dialogue)
        counts["assistant turns carry no loss: they are empty, or have weight 0"] += n_unlearned
        if not messages and not n_unlearned:
            raise Misfit(f"no assistant turn to learn from; needs {NEEDS['sft']}")
        counts["dialogues with no assistant turn to learn from left out"] += not messages
        counts["empty completions: only their end is learned"] += messages[-1:] == [
            ("assistant", "")
        ]
        return Example(messages, source) if messages else None

    examples = list(read(paths, "sft", make, columns, skip))
    for what, n in counts.items():
        if n:
            once(warn, f"{n} {what}")
    return examples


def load_prompts(paths, columns=(), skip=0):
    """PPO: dialogues up to the last user turn, each once, with the columns of its first record."""

    def make(source, record):
        messages = list(record.get("prompt") or record.get("messages") or [])
        while messages and messages[-1][0] != "user":
            messages.pop()
        if not messages:
            raise Misfit("no 'prompt' and no user turn to answer")
        return Example(messages, source, columns=record["columns"])

    return unique(list(read(paths, "ppo", make, columns, skip)))


def unique(prompts):
    """The prompts without repetitions, of which it says how many there were."""
    first = {}
    for example in prompts:
        first.setdefault(str(example.messages), example)
    if repeated := len(prompts) - len(first):
        once(note, f"{repeated:,} of {len(prompts):,} prompts are repetitions, and left out")
    return list(first.values())


def load_feedback(paths, columns=(), skip=0):
    """RM: (kind, list of Feedback), kind one of "comparisons", "rankings", "ratings", "thumbs"."""
    counts, first = Counter(), []

    def make(source, record):
        kind, completions, target = judgement(record)
        first[:] = first or [kind, source]
        if kind != first[0]:
            die(f"{source}: {kind}, but {first[1]} has {first[0]}; one kind of feedback per run")
        if kind in ("comparisons", "rankings") and len(set(map(str, completions))) == 1:
            counts["single"] += 1
            return None
        return Feedback(record["prompt"], source, completions, target, record["labeler"])

    examples = list(read(paths, "rm", make, columns, skip))
    if counts:
        once(warn, f"{counts['single']} {first[0]} of a text with itself, or alone, left out")
    if not examples:
        die(f"{paths[0]}: nothing to compare in it")
    return first[0], examples


def kind_of(record):
    """What kind of judgement a record holds; None where it holds none."""
    if "chosen" in record and "rejected" in record and "prompt" in record:
        return "comparisons"
    if "ranks" in record:
        return "rankings"
    kinds = {"rating": "ratings", "label": "thumbs"} if "completion" in record else {}
    return next((kind for key, kind in kinds.items() if key in record), None)


def judgement(record):
    """(kind, completions, target) of a record."""
    kind = kind_of(record)
    if kind is None:
        raise Misfit(f"no judgement in it; needs {NEEDS['rm']}")
    if kind == "comparisons":
        completions, target = [record["chosen"], record["rejected"]], [1, 2]
    elif kind == "rankings":
        completions, target = record["completions"], tied(record["completions"], record["ranks"])
    else:
        completions = [record["completion"]]
        target = [stars(record["rating"]) if kind == "ratings" else like(record["label"])]
    if any(as_turns(reply)[-1][0] == "user" for reply in completions):
        raise Misfit("a judged reply must not end with a user turn")
    return kind, completions, target


def tied(completions, ranks):
    """A text that is given twice is not better than itself: it gets the best of its ranks."""
    best = {}
    for text, rank in zip(map(str, completions), ranks):
        best[text] = min(rank, best.get(text, rank))
    return [best[text] for text in map(str, completions)]


def stars(value):
    try:
        rating = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        rating = math.nan  # within no limits
    if not 0 <= rating <= 5:
        raise Misfit(f"'rating' must be a number from 0 to 5, found {value!r}")
    return rating


def like(value):
    if str(value).lower() not in LIKE + DISLIKE:
        raise Misfit(f"'label' must be one of {', '.join(LIKE + DISLIKE)}; found {value!r}")
    return float(str(value).lower() in LIKE)


def write_records(path, records):
    """Write dicts as a .jsonl file; returns its path as a string."""
    durable.write_text(path, "".join(json.dumps(record) + "\n" for record in records))
    return str(path)
