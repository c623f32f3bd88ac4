"""What a file of data is taken for, before anything trains on it."""

import re
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import groupby

from nanorlhf.config import arg, die, note, template_flag
from nanorlhf.data import dialogue
from nanorlhf.data.examples import (
    demonstration,
    first_user_turn,
    judgement,
    load_demonstrations,
    load_feedback,
    load_prompts,
    read,
    read_texts,
    record_text,
)
from nanorlhf.data.files import is_records
from nanorlhf.data.split import held_out_prompts
from nanorlhf.data.values import Misfit
from nanorlhf.hf.load import load_gpt
from nanorlhf.run import checkpoint
from nanorlhf.tokenizer import byte_tokenizer

BINS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass
class Config:
    """Show what a data file is recognised as, how it is tokenised and how long it is."""

    data: str = arg("", "file or hf:owner/name[/config][:split]", positional=True)
    columns: list[str] = arg([], "rename columns, as in prompt=question chosen=best")
    disliked: str = arg(
        "refuse", "sft: replies that people disliked", choices=("refuse", "skip", "learn")
    )
    stage: str = arg(
        "",
        "show what this stage makes of it; default: the last that can use it",
        choices=("", "gpt", "sft", "rm", "ppo"),
    )
    init: str = arg(
        "out/gpt", "model whose vocabulary and context count; bytes where there is none"
    )
    template: str = template_flag()
    block_size: int = arg(0, "context in tokens; 0: that of --init")
    show: int = arg(3, "examples to print", low=0)
    max_tokens: int = arg(160, "tokens of an example to print")


def main(cfg):
    if not cfg.data:
        die("which data? python -m nanorlhf data FILE, or hf:owner/name; --help lists the flags")
    tokenizer, block_size = vocabulary(cfg)
    usable = stages_of_file(cfg)
    if not usable:
        die(f"{cfg.data}: no stage can use all of these records together")
    stage = cfg.stage or next(s for s in ("rm", "sft", "ppo", "gpt") if s in usable)
    summary, rows = READ[stage](cfg, tokenizer)
    if not rows:
        die(f"{cfg.data}: nothing is left of it for train_{stage}.py: {summary}")
    print(f"  train_{stage}.py: {summary}")
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
        _, found = load_gpt(cfg.init, template=cfg.template)
        return found.tokenizer, cfg.block_size or found.model_config.block_size
    print("no model in out/gpt yet: lengths are in bytes; --init gpt2 counts in GPT-2's tokens")
    return byte_tokenizer(), cfg.block_size


def stages_of_file(cfg):
    """The stages that can use every record of --data; prints what the records are read as."""
    if not is_records(cfg.data):
        n_documents = sum(1 for _ in read_texts([cfg.data]))
        print(f"{cfg.data}: {n_documents:,} documents of plain text")
        return {"gpt"}
    shapes, others, usable = Counter(), set(), set(READ)
    for record in read([cfg.data], cfg.stage, lambda source, record: record, cfg.columns):
        shapes[record["shape"]] += 1
        others |= record["columns"].keys() - set(re.findall(r"\w+", record["shape"].keys))
        usable &= stages_of(record, cfg.disliked)
    for shape, n in shapes.items():
        print(f"{cfg.data}: {n:,} records read as {shape.name!r} (columns {shape.keys})")
    if others:
        note(f"  other columns: {', '.join(sorted(others))}")
    return usable if shapes else set()


def stages_of(record, disliked):
    """The stages that can use a record."""
    usable = {"gpt"} if record_text(record) is not None else set()
    if first_user_turn(record.get("prompt", record.get("messages", []))):
        usable.add("ppo")
    if any(role == "assistant" for role, _ in demonstration(record) or []):
        usable.add("sft")
    try:
        kind, _, target = judgement(record)
    except Misfit:
        return usable
    is_refused = (kind, target, disliked) == ("thumbs", [0], "refuse")
    return (usable - {"sft"} if is_refused else usable) | {"rm"}


# ---- what each stage makes of it: (a summary, rows of (ids, marks)) ----------------------------

MARKED = {  # what a True in marks means
    "gpt": "all that carry loss",
    "sft": "those that carry loss",
    "rm": "the one at which the score is read",
    "ppo": "none",
}


def of_gpt(cfg, tokenizer):
    texts = [text for _, text in read_texts([cfg.data], cfg.columns)]
    documents = [[*ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(texts)]
    n_tokens = sum(map(len, documents))
    summary = f"{len(documents):,} documents, {n_tokens:,} tokens"
    return summary, [(ids, [True] * len(ids)) for ids in documents]


def of_sft(cfg, tokenizer):
    examples = load_demonstrations([cfg.data], cfg.columns, cfg.disliked)
    rows = [dialogue.encode_dialogue(tokenizer, e.messages) for e in examples]
    n_turns = sum(role == "assistant" for e in examples for role, _ in e.messages)
    n_tokens = sum(sum(marks) for _, marks in rows)
    summary = f"{held_out(examples)}, loss on {n_tokens:,} tokens of {n_turns:,} assistant turns"
    return summary, rows


def of_rm(cfg, tokenizer):
    kind, examples = load_feedback([cfg.data], cfg.columns)
    n_labelers = len({e.labeler for e in examples})
    pairs = [(e.messages, c) for e in examples for c in e.completions]
    texts = [dialogue.encode_pair(tokenizer, messages, c) for messages, c in pairs]
    judged = f"{kind} of {len(texts):,} completions by {n_labelers} labeler(s)"
    rows = [(ids, [False] * (len(ids) - 1) + [True]) for ids in texts]
    return f"{held_out(examples)}: {judged}", rows


def of_ppo(cfg, tokenizer):
    examples = load_prompts([cfg.data], cfg.columns)
    prompts = [dialogue.encode_prompt(tokenizer, e.messages) for e in examples]
    rows = [(ids, [False] * len(ids)) for ids in prompts]
    return f"{held_out(examples)}: prompts to answer", rows


READ = {"gpt": of_gpt, "sft": of_sft, "rm": of_rm, "ppo": of_ppo}


def held_out(examples):
    prompts = held_out_prompts(examples)
    n = sum(e.first_turn in prompts for e in examples)
    openings = len({e.first_turn for e in examples})
    return f"{len(examples):,} examples, {n:,} of them held out, {openings:,} different first turns"


# ---- output ------------------------------------------------------------------------------------


def marked(tokenizer, ids, marks):
    """Tokens as text with | between them. Marked ones that follow each other share a pair of
    brackets, which is green on a terminal."""
    before, after = ("\033[32m[", "]\033[0m") if sys.stdout.isatty() else ("[", "]")
    runs = []
    for is_marked, run in groupby(zip(ids, marks), lambda pair: pair[1]):
        words = "|".join(plain(tokenizer, i) for i, _ in run)
        runs.append(before + words + after if is_marked else words)
    return "".join(runs)


def plain(tokenizer, i):
    """A token as text: a special one's name; where it holds part of a character only, its bytes."""
    for name, special in tokenizer.special.items():
        if special == i:
            return name
    return tokenizer.encoding.decode_single_token_bytes(i).decode(errors="backslashreplace")


def histogram(lengths, block_size, stage):
    """How many rows have how many tokens, and how many are too long."""
    print(f"\ntokens per row: mean {sum(lengths) / len(lengths):.1f}, longest {max(lengths):,}")
    edges = [0, *BINS, max(max(lengths) + 1, BINS[-1] + 1)]
    counts = [sum(low <= n < high for n in lengths) for low, high in zip(edges, edges[1:])]
    filled = [i for i, count in enumerate(counts) if count]
    for i in range(filled[0], filled[-1] + 1):
        bar = "#" * round(40 * counts[i] / max(counts))
        print(f"  {edges[i]:5} to {edges[i + 1] - 1:5} {counts[i]:8,} {bar}")
    if block_size and stage != "gpt" and (over := sum(n > block_size for n in lengths)):
        print(
            f"{over:,} of {len(lengths):,} exceed the context of {block_size} tokens: prompts "
            "lose their left, and rows whose response alone is longer are left out"
        )
