"""What a file of data is taken for, before anything trains on it."""

import sys
from collections import Counter
from dataclasses import dataclass
from itertools import groupby

from nanorlhf.config import arg, die, note, template_flag, visible
from nanorlhf.data import dialogue, examples
from nanorlhf.data.split import held_out_prompts
from nanorlhf.loading import load_gpt
from nanorlhf.run import checkpoint
from nanorlhf.tokenizer import byte_tokenizer

STAGES = {"kind": "rm", "messages": "sft", "prompt": "ppo", "text": "gpt"}  # by what they need


@dataclass
class Config:
    """Show what a data file is recognised as, how it is tokenised and how long it is."""

    data: str = arg("", "file or hf:owner/name[/config][:split]", positional=True)
    columns: list[str] = arg([], "rename columns, as in prompt=question chosen=best")
    disliked: str = arg("refuse", "sft: disliked replies", choices=("refuse", "skip", "learn"))
    stage: str = arg("", "whose use of it; default: the last that can", ("", *STAGES.values()))
    init: str = arg("out/gpt", "whose vocabulary and context count; bytes where there is none")
    template: str = template_flag()
    block_size: int = arg(0, "context in tokens; 0: that of --init")
    show: int = arg(3, "examples to print", low=0)
    max_tokens: int = arg(160, "tokens of an example to print")


def main(cfg):
    if not cfg.data:
        die("which data? python -m nanorlhf data FILE, or hf:owner/name; --help lists the flags")
    tokenizer, block_size, whose = vocabulary(cfg)
    stage = recognised(cfg)
    summary, rows = encoded(stage, cfg, tokenizer)
    if not rows:
        die(f"{cfg.data}: nothing is left of it for train_{stage}.py")
    print(f"\nWhat train_{stage}.py reads, in tokens of {whose}, apart by |; in [] what carries")
    print("loss, or where a reward is read:")
    for ids, marks in rows[: cfg.show]:
        more = f" ... {len(ids) - cfg.max_tokens} more" if len(ids) > cfg.max_tokens else ""
        print("\n" + marked(tokenizer, ids[: cfg.max_tokens], marks) + more)
    counts = sorted(len(ids) for ids, _ in rows)
    middle, most = (counts[int(share * len(counts))] for share in (0.5, 0.95))
    lengths = f"half up to {middle:,}, 95 % up to {most:,}, longest {counts[-1]:,}"
    print(f"\n{summary}\ntokens per row: mean {sum(counts) / len(counts):.1f}, {lengths}")
    if block_size and stage != "gpt" and (over := sum(n > block_size for n in counts)):
        share = f"{over:,} of {len(counts):,}"
        print(f"{share} exceed the context of {block_size} tokens: docs/data.md")


def vocabulary(cfg):
    """(tokenizer, context, whose they are) of --init; bytes where nothing is there yet."""
    if cfg.init == "out/gpt" and not checkpoint.find(cfg.init):
        print("no model in out/gpt yet: lengths are in bytes; --init gpt2 counts in GPT-2's tokens")
        return byte_tokenizer(), cfg.block_size, "one byte"
    _, found = load_gpt(cfg.init, template=cfg.template)
    return found.tokenizer, cfg.block_size or found.model_config.block_size, cfg.init


def recognised(cfg):
    """Print what the records are read as, and which other columns they have. Returns --stage;
    without it, the last stage that finds in every record what it needs."""
    shapes, unused, keys = Counter(), set(), set(STAGES)
    for record in examples.read([cfg.data], cfg.stage, lambda source, record: record, cfg.columns):
        shapes[record["shape"]] += 1
        unused |= record["columns"].keys() - record["shape"].columns.values()
        keys &= record.keys()
    for shape, n in shapes.items():
        note(f"{cfg.data}: {n:,} records read as {shape.name!r} (columns {shape.keys})")
    note(f"  other columns: {', '.join(sorted(unused)) or 'none'}")
    return cfg.stage or next((STAGES[key] for key in STAGES if key in keys), "gpt")


def encoded(stage, cfg, tokenizer):
    """(a summary, [(ids, marks)]) of what a stage makes of the data."""
    paths, columns = [cfg.data], cfg.columns
    if stage == "gpt":
        texts = (text for _, text in examples.read_texts(paths, columns))
        rows = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
        return f"{len(rows):,} documents", [(ids, [True] * len(ids)) for ids in rows]
    if stage == "sft":
        loaded = examples.load_demonstrations(paths, columns, cfg.disliked)
        rows = [tokenizer.dialogue(e.messages) for e in loaded]
    elif stage == "rm":
        _, loaded = examples.load_feedback(paths, columns)
        pairs = [(e.messages, c) for e in loaded for c in e.completions]
        rows = [dialogue.encode_pair(tokenizer, *pair)[0] for pair in pairs]
        rows = [(ids, [False] * (len(ids) - 1) + [True]) for ids in rows]
    else:
        loaded = examples.load_prompts(paths, columns)
        prompts = [dialogue.encode_prompt(tokenizer, e.messages) for e in loaded]
        rows = [(ids, [False] * len(ids)) for ids in prompts]
    held_out = held_out_prompts(loaded)
    n = sum(e.first_turn in held_out for e in loaded)
    return f"{len(loaded) - n:,} examples to train on and {n:,} held out", rows


def marked(tokenizer, ids, marks):
    """Tokens as text with | between them. Marked ones that follow each other share a pair of
    brackets, which is green on a terminal."""
    before, after = ("\033[32m[", "]\033[0m") if sys.stdout.isatty() else ("[", "]")
    runs = []
    for is_marked, run in groupby(zip(ids, marks), lambda pair: pair[1]):
        words = visible("|".join(tokenizer.token_text(i) for i, _ in run))
        runs.append(before + words + after if is_marked else words)
    return "".join(runs)
