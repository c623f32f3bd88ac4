"""What a file of data is taken for, before anything trains on it."""

import sys
from collections import Counter
from dataclasses import dataclass
from itertools import groupby

from nanorlhf.config import arg, die
from nanorlhf.data import dialogue
from nanorlhf.data.examples import (
    demonstration,
    first_user_turn,
    is_held_out,
    is_records,
    judgement,
    load_demonstrations,
    load_feedback,
    load_prompts,
    read,
    read_texts,
    record_text,
)
from nanorlhf.hf.load import load_gpt
from nanorlhf.run import checkpoint
from nanorlhf.tokenizer import SPECIAL, byte_tokenizer

BINS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass
class Config:
    """Show what a data file is recognised as, how it is tokenised and how long it is."""

    data: str = arg("", "file or hf:owner/name[/config][:split]", positional=True)
    columns: list[str] = arg([], "rename columns, as in prompt=question chosen=best")
    stage: str = arg(
        "",
        "show what this stage makes of it; default: the last that can use it",
        choices=("", "gpt", "sft", "rm", "ppo"),
    )
    init: str = arg(
        "out/gpt", "model whose vocabulary and context count; bytes where there is none"
    )
    block_size: int = arg(0, "context in tokens; 0: that of --init")
    show: int = arg(3, "examples to print", low=0)
    max_tokens: int = arg(160, "tokens of an example to print")


def main(cfg):
    if not cfg.data:
        die("which data? python -m nanorlhf data FILE, or hf:owner/name; --help lists the flags")
    tokenizer, block_size = vocabulary(cfg)
    shapes, usable = Counter(), None
    if is_records(cfg.data):
        for _, shape, record in read([cfg.data], cfg.columns):
            shapes[shape] += 1
            usable = (usable or set("gpt sft rm ppo".split())) & stages_of(record)
        for shape, n in shapes.items():
            print(f"{cfg.data}: {n:,} records read as {shape.name!r} (columns {shape.keys})")
    else:
        usable = {"gpt"}
        n = sum(1 for _ in read_texts([cfg.data]))
        print(f"{cfg.data}: {n:,} documents of plain text")
    if not usable:
        die(f"{cfg.data}: no stage can use all of these records together")
    stage = cfg.stage or next(s for s in ("rm", "sft", "ppo", "gpt") if s in usable)
    if stage not in usable:
        die(f"{cfg.data}: of use to {', '.join(sorted(usable))}, not to {stage}")
    what, rows = READ[stage](cfg, tokenizer)
    print(f"  train_{stage}.py: {what}")
    if others := usable - {stage}:
        print(f"  also of use to {', '.join(f'train_{s}.py' for s in sorted(others))} (--stage)")
    print(f"\nWhat train_{stage}.py reads, tokens apart by |, {MARKED[stage]} in brackets:")
    for ids, marks in rows[: cfg.show]:
        more = f" ... {len(ids) - cfg.max_tokens} more" if len(ids) > cfg.max_tokens else ""
        print("\n" + marked(tokenizer, ids[: cfg.max_tokens], marks) + more)
    histogram([len(ids) for ids, _ in rows], block_size, stage)


def vocabulary(cfg):
    """(tokenizer, context) of --init; bytes where nothing is there yet."""
    if cfg.init != "out/gpt" or checkpoint.find(cfg.init):
        _, found = load_gpt(cfg.init)
        return found.tokenizer, cfg.block_size or found.model_config.block_size
    print("no model in out/gpt yet: lengths are in bytes; --init gpt2 counts in GPT-2's tokens")
    return byte_tokenizer(), cfg.block_size


def stages_of(record):
    """The stages that can use a record."""
    fits = {"sft"} if demonstration(record) else set()
    fits |= {"gpt"} if record_text(record) is not None else set()
    fits |= {"ppo"} if first_user_turn(record) is not None else set()
    try:
        judgement(record, refuse)
    except ValueError:
        return fits
    return fits | {"rm"}


def refuse(reason):
    raise ValueError(reason)


# ---- what each stage makes of it: (in words, rows of (ids, which are marked)) ------------------

MARKED = {
    "gpt": "all that carry loss",
    "sft": "those that carry loss",
    "rm": "the one at which the score is read",
    "ppo": "none",
}


def of_gpt(cfg, tokenizer):
    texts = [text for _, text in read_texts([cfg.data], cfg.columns)]
    rows = [[*ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(texts)]
    n = sum(map(len, rows))
    return f"{len(rows):,} documents, {n:,} tokens", [(ids, [True] * len(ids)) for ids in rows]


def of_sft(cfg, tokenizer):
    examples = load_demonstrations([cfg.data], cfg.columns)
    rows = [dialogue.encode_dialogue(tokenizer, e.messages) for e in examples]
    turns = sum(role == "assistant" for e in examples for role, _ in e.messages)
    n = sum(sum(marks) for _, marks in rows)
    return f"{held_out(examples)}, loss on {n:,} tokens of {turns:,} assistant turns", rows


def of_rm(cfg, tokenizer):
    kind, examples = load_feedback([cfg.data], cfg.columns)
    labelers = len({e.labeler for e in examples})
    rows = [dialogue.encode_pair(tokenizer, e.messages, c) for e in examples for c in e.completions]
    at_end = lambda ids: [False] * (len(ids) - 1) + [True]
    what = f"{held_out(examples)}: {kind} of {len(rows):,} completions by {labelers} labeler(s)"
    return what, [(ids, at_end(ids)) for ids in rows]


def of_ppo(cfg, tokenizer):
    examples = load_prompts([cfg.data], cfg.columns)
    rows = [dialogue.encode_prompt(tokenizer, e.messages) for e in examples]
    return f"{held_out(examples)}: prompts to answer", [(ids, [False] * len(ids)) for ids in rows]


READ = {"gpt": of_gpt, "sft": of_sft, "rm": of_rm, "ppo": of_ppo}


def held_out(examples):
    n = sum(is_held_out(e.first_turn) for e in examples)
    openings = len({e.first_turn for e in examples})
    return f"{len(examples):,} examples, {n:,} of them held out, {openings:,} different first turns"


# ---- output ------------------------------------------------------------------------------------


def marked(tokenizer, ids, marks):
    """Tokens as text, runs of those that are marked in brackets (and green on a terminal)."""
    special = dict(enumerate(SPECIAL, len(tokenizer.ranks)))
    before, after = ("\033[32m[", "]\033[0m") if sys.stdout.isatty() else ("[", "]")
    runs = []
    for is_marked, run in groupby(zip(ids, marks), lambda pair: pair[1]):
        words = "|".join(special.get(i) or plain(tokenizer, i) for i, _ in run)
        runs.append(before + words + after if is_marked else words)
    return "".join(runs)


def plain(tokenizer, i):
    """One token; of half a character, its bytes."""
    return tokenizer.encoding.decode_single_token_bytes(i).decode(errors="backslashreplace")


def histogram(lengths, block_size, stage):
    """How many rows have how many tokens, and how many are too long."""
    print(f"\ntokens per row: mean {sum(lengths) / len(lengths):.1f}, longest {max(lengths):,}")
    counts, low = [], 0
    for high in (*BINS, max(max(lengths) + 1, BINS[-1] + 1)):
        counts.append((low, high, sum(low <= n < high for n in lengths)))
        low = high
    filled = [i for i, (*_, n) in enumerate(counts) if n]
    counts = counts[filled[0] : filled[-1] + 1]
    most = max(n for *_, n in counts)
    for low, high, n in counts:
        print(f"  {low:5} to {high - 1:5} {n:8,} {'#' * round(40 * n / most)}")
    if block_size and stage != "gpt" and (over := sum(n > block_size for n in lengths)):
        print(
            f"{over:,} of {len(lengths):,} exceed the context of {block_size} tokens: prompts "
            "lose their left, and rows whose response alone is longer are left out"
        )
