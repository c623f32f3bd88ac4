"""Which prompts are held out. The split goes by what the user says first, never by pair or row, nor
by a system text before it: with one prompt on both sides, the measured accuracy is too high."""

import zlib

from nanorlhf.config import die, once, warn


def crc32(text):
    return zlib.crc32(text.encode("utf-8", errors="replace"))


def is_held_out(first_turn):
    """Whether a prompt is one of the tenth that is held out."""
    return first_turn != "" and crc32(first_turn) % 10 == 0


def fold_of(first_turn, n):
    """Which of n parts a prompt is in, where each part is held out in turn."""
    return crc32("fold" + first_turn) % n


def held_out_prompts(examples):
    """The first turns that are held out of these: by `is_held_out`. Of fewer than a hundred, where
    that may be far from a tenth, and where it takes all or none, a tenth exactly, but one at least:
    those of `is_held_out` first, which other stages hold out too."""
    prompts = {e.first_turn for e in examples}
    held_out = set(filter(is_held_out, prompts))
    if len(prompts) > 1 and (len(prompts) < 100 or len(held_out) in (0, len(prompts))):
        order = sorted(prompts, key=lambda p: (p not in held_out, crc32(p), p))
        return set(order[: max(1, len(prompts) // 10)])
    return held_out


def split_held_out(examples, val_examples):
    """(training, validation): as given, or where no validation examples are given, by
    `held_out_prompts`. Exits 2 where one side is empty."""
    if not val_examples:
        held_out = held_out_prompts(examples)
        val_examples = [e for e in examples if e.first_turn in held_out]
        examples = [e for e in examples if e.first_turn not in held_out]
    elif n := len({e.first_turn for e in examples} & {e.first_turn for e in val_examples}):
        once(warn, f"{n} prompts of --val_data are in --data, too: they are not held out")
    if not examples or not val_examples:
        held_out = f"{len(val_examples)} held out (one prompt in ten, by its hash)"
        die(f"{len(examples)} examples to train on and {held_out}: give more data, or --val_data")
    return examples, val_examples
