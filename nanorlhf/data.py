"""Files -> examples -> batches.

Shapes: B examples, K completions of one prompt, T positions. A batch is a dict of tensors whose
first dimension is B, plus "source", where each example came from, for error messages. "weight"
(B,) is what an example counts for in a mean: its loss tokens, or 1.

The chat template, used by every stage after pretraining and defined here only:
<|user|>prompt<|assistant|>completion<|endoftext|>, repeated for several turns.
"""

import gzip
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
import torch

from nanorlhf.config import die

END_OF_DOCUMENT = "<|endoftext|>"  # on a line of its own in a .txt file


# ---- reading -----------------------------------------------------------------------------------


def _lines(path):
    """(line number, line) of a text file, .gz or not; what cannot be read exits 2."""
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8") as f:
            empty = True
            for number, line in enumerate(f, 1):
                empty = empty and not line.strip()
                yield number, line
    except UnicodeDecodeError as error:
        die(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})")
    except (OSError, EOFError) as error:
        die(f"{path}: {getattr(error, 'strerror', None) or error}")
    if empty:
        die(f"{path}: the file is empty")


def read_records(paths):
    """Yields (source, object) for every line of .jsonl or .jsonl.gz files."""
    for path in paths:
        for number, line in _lines(path):
            source = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                die(f"{source}: not JSON ({error.msg} at column {error.colno})")
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
            document = []
            for _, line in _lines(path):
                if line.strip() == END_OF_DOCUMENT:
                    yield from _document(document)
                    document = []
                else:
                    document.append(line)
            yield from _document(document)


def _document(lines):
    text = "".join(lines).strip("\n")
    return [(text, text)] if text.strip() else []


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
        return turns[0][1] if turns else None
    return record.get("prompt")


def is_held_out(first_turn):
    """The validation split: one in ten, by what the user said first. Never by pair or row: two
    rows about one prompt on both sides of a split inflate the accuracy that is measured."""
    return crc32(first_turn.encode("utf-8", errors="replace")) % 10 == 0


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
    empty = sum(not e.messages[-1][1] for e in examples)
    if empty:
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
    examples, kinds = [], {}
    for source, record in read_records(paths):
        kind, messages, completions, target = _feedback(record, source)
        kinds.setdefault(kind, source)
        if len(kinds) > 1:
            (a, first), (b, _) = kinds.items()
            die(f"{source}: {b}, but {first} has {a}; one kind of feedback per run")
        labeler = str(record.get("labeler", ""))
        examples.append(Feedback(messages, source, completions, target, labeler))
    return next(iter(kinds)), examples


def _feedback(record, source):
    if "chosen" in record and "prompt" not in record:
        chosen, rejected = _string(record, "chosen", source), _string(record, "rejected", source)
        same = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), None)
        same = min(len(chosen), len(rejected)) if same is None else same
        turn = "\n\nAssistant:"
        cut = chosen.rfind(turn, 0, same)
        if cut < 0:
            die(f"{source}: chosen and rejected share no prompt that ends in {turn!r}")
        completions = [text[cut + len(turn) :].strip() for text in (chosen, rejected)]
        return "comparisons", _hh_messages(chosen[:cut]), completions, [1, 2]
    if isinstance(record.get("prompt"), list):
        messages = _messages(record["prompt"], source)
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


def warn(message):
    print(f"warning: {message}", file=sys.stderr, flush=True)


def split_held_out(examples, val_examples):
    """(training, validation) by `is_held_out`, or as given; neither may be empty."""
    train = examples
    if not val_examples:
        train = [e for e in examples if not is_held_out(e.first_turn)]
        val_examples = [e for e in examples if is_held_out(e.first_turn)]
    if not train or not val_examples:
        die(f"{len(train)} examples to train on and {len(val_examples)} held out (one prompt in "
            "ten, by its hash): give more data, or --val_data")  # fmt: skip
    return train, val_examples


def write_records(path, records):
    """Objects -> a .jsonl file; returns its path as a string."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    except OSError as error:
        die(f"{path}: {error.strerror}")
    return str(path)


# ---- encoding ----------------------------------------------------------------------------------


def encode_prompt(tokenizer, messages):
    """Ids of a dialogue up to where the assistant speaks next."""
    return encode_dialogue(tokenizer, messages)[0] + [tokenizer.assistant_id]


def encode_dialogue(tokenizer, messages):
    """(ids, is_loss): the template, and True on the assistant's words and their eos."""
    ids, is_loss = [], []
    for role, content in messages:
        words = tokenizer.encode(content)
        if role == "user":
            turn, mask = [tokenizer.user_id, *words], [False] * (len(words) + 1)
        else:
            turn = [tokenizer.assistant_id, *words, tokenizer.eos_id]
            mask = [False] + [True] * (len(words) + 1)
        ids, is_loss = ids + turn, is_loss + mask
    return ids, is_loss


def encode_demonstrations(tokenizer, examples, block_size):
    """SFT examples -> rows of (ids, is_loss, source) that fit block_size."""
    encoded = [encode_dialogue(tokenizer, e.messages) for e in examples]
    last = [len(tokenizer.encode(e.messages[-1][1])) + 1 for e in examples]
    ids, kept = fit([ids for ids, _ in encoded], last, block_size, "dialogues")
    return [(r, encoded[i][1][-block_size:], examples[i].source) for r, i in zip(ids, kept)]


def encode_feedback(tokenizer, examples, block_size):
    """Feedback -> rows of ([ids per completion], target, source); all of one fit, or none."""
    flat = [(i, encode_pair(tokenizer, e.messages, c)) for i, e in enumerate(examples)
            for c in e.completions]  # fmt: skip
    n_response = [len(tokenizer.encode(c)) + 1 for e in examples for c in e.completions]
    ids, kept = fit([row for _, row in flat], n_response, block_size, "completions")
    found = {}
    for row, k in zip(ids, kept):
        found.setdefault(flat[k][0], []).append(row)
    return [(rows, examples[i].target, examples[i].source) for i, rows in found.items()
            if len(rows) == len(examples[i].completions)]  # fmt: skip


@dataclass
class Prompt:
    """A prompt ready for PPO."""

    ids: list
    text: str  # what a reward function sees
    source: str


def encode_prompts(tokenizer, examples, room):
    """PPO examples -> Prompts of at most `room` tokens, cut from the left."""
    ids = [encode_prompt(tokenizer, e.messages) for e in examples]
    ids, _ = fit(ids, [0] * len(ids), room, "prompts")
    texts = ["\n".join(content for _, content in e.messages) for e in examples]
    return [Prompt(row, text, e.source) for row, text, e in zip(ids, texts, examples)]


def encode_pair(tokenizer, messages, completion):
    """Ids of a prompt with one completion and its eos, what the reward model reads."""
    return encode_dialogue(tokenizer, messages + [("assistant", completion)])[0]


def fit(rows, n_response, block_size, what):
    """Cut (ids, ...) rows from the left to block_size; the last n_response[i] ids are sacred.

    Returns (rows, kept): kept are the indices of rows whose response fits with one prompt token.
    """
    kept = [i for i, n in enumerate(n_response) if n < block_size]
    cut = sum(len(rows[i]) > block_size for i in kept)
    if cut:
        warn(f"{cut} of {len(rows)} {what} exceed {block_size} tokens: prompts cut from the left")
    if len(kept) < len(rows):
        warn(f"{len(rows) - len(kept)} of {len(rows)} {what} dropped: the response alone is too long")
    if not kept:
        die(f"no {what} fits into {block_size} tokens")
    return [rows[i][-block_size:] for i in kept], kept


# ---- batches -----------------------------------------------------------------------------------


def pad(rows, pad_id, left=False):
    """Lists of ids -> tokens (B, T), mask (B, T) bool, padded on the right or the left."""
    T = max(map(len, rows))
    tokens = torch.full((len(rows), T), pad_id)
    mask = torch.zeros(len(rows), T, dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(T - len(row), T) if left else slice(0, len(row))
        tokens[i, where] = torch.tensor(row, dtype=torch.long)
        mask[i, where] = True
    return tokens, mask


def epoch_batch(n, batch_size, seed, step):
    """Indices of the examples of one step: every epoch is a new permutation. Pure in its
    arguments, so exact resume needs no state."""
    per_epoch = -(-n // batch_size)
    order = np.random.default_rng([seed, step // per_epoch]).permutation(n)
    start = step % per_epoch * batch_size
    return order[start : start + batch_size]


def dialogue_batch(rows, indices, pad_id):
    """SFT: rows of (ids, is_loss, source) -> tokens (B, T), mask (B, T) of what is learned."""
    chosen = [rows[i] for i in indices]
    tokens, _ = pad([ids for ids, _, _ in chosen], pad_id)
    mask, _ = pad([is_loss for _, is_loss, _ in chosen], 0)
    mask = mask.bool()
    weight = mask.sum(1).float()
    return {"tokens": tokens, "mask": mask, "weight": weight, "source": [s for *_, s in chosen]}


def feedback_batch(rows, indices, pad_id):
    """RM: rows of ([ids per completion], target, source) -> tokens, mask (B, K, T), present and
    target (B, K). Absent completions have rank 0. A prompt with no ordered pair weighs nothing."""
    chosen = [rows[i] for i in indices]
    K = max(len(completions) for completions, _, _ in chosen)
    flat = [ids for completions, _, _ in chosen for ids in completions]
    tokens, mask = pad(flat, pad_id)  # (N, T)
    present = torch.tensor([[k < len(c) for k in range(K)] for c, _, _ in chosen])  # (B, K)
    target = torch.tensor([[*t, *[0] * (K - len(t))] for _, t, _ in chosen])  # (B, K)
    batch = {"present": present, "target": target, "source": [s for *_, s in chosen]}
    for name, x, fill in (("tokens", tokens, pad_id), ("mask", mask, False)):
        batch[name] = torch.full((*present.shape, x.shape[1]), fill, dtype=x.dtype)  # (B, K, T)
        batch[name][present] = x
    batch["weight"] = torch.tensor([float(len(t) == 1 or len(set(t)) > 1) for _, t, _ in chosen])
    return batch


def batches(rows, batch_size, collate, pad_id):
    """All rows in order, for evaluation."""
    starts = range(0, len(rows), batch_size)
    return [collate(rows, range(s, min(s + batch_size, len(rows))), pad_id) for s in starts]


def write_tokens(texts, tokenizer, path):
    """Encode documents, an eos before and after each, into a uint16 (or uint32) file; returns a
    memmap and the number of UTF-8 bytes. The corpus is never in memory as a whole."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    n_bytes = 0
    with open(path, "wb") as file:
        file.write(np.array([tokenizer.eos_id], dtype).tobytes())
        for text in texts:
            file.write(np.array([*tokenizer.encode(text), tokenizer.eos_id], dtype).tobytes())
            n_bytes += len(text.encode("utf-8", errors="replace"))
    return np.memmap(path, dtype, mode="r"), n_bytes


def text_batch(stream, starts, length, source):
    """Windows of length + 1 tokens from a token stream, at the given starts."""
    windows = np.stack([stream[s : s + length + 1] for s in starts]).astype(np.int64)
    return {
        "tokens": torch.from_numpy(windows),  # (B, T + 1)
        "weight": torch.full((len(starts),), float(length)),
        "source": [f"{source}, token {s}" for s in starts],
    }
