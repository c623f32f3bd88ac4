"""What a file of data is taken for, before anything trains on it."""

import re
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import groupby

from nanorlhf.config import arg, die, note, template_flag
from nanorlhf.data import dialogue, examples
from nanorlhf.data.split import held_out_prompts
from nanorlhf.data.values import Misfit
from nanorlhf.loading import load_gpt
from nanorlhf.run import checkpoint
from nanorlhf.tokenizer import byte_tokenizer

NAMES = ("gpt", "sft", "rm", "ppo")

NAMES = ("gpt", "sft", "rm", "ppo")


@dataclass
class Config:
    """Show what a data file is recognised as, how it is tokenised and how long it is."""

    data: str = arg("", "file or hf:owner/name[/config][:split]", positional=True)
    columns: list[str] = arg([], "rename columns, as in prompt=question chosen=best")
    disliked: str = arg(
        "refuse", "sft: replies that people disliked", choices=("refuse", "skip", "learn")
    )
    stage: str = arg(
        "", "what this stage makes of it; default: the last that can", choices=("", *NAMES)
    )
    init: str = arg("out/gpt", "whose vocabulary and context count; bytes where there is none")
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
    of_stage, meaning = READ[stage]
    summary, rows = of_stage(cfg, tokenizer)
    if not rows:
        die(f"{cfg.data}: nothing is left of it for train_{stage}.py: {summary}")
    print(f"  train_{stage}.py: {summary}")
    if others := usable - {stage}:
        print(f"  also of use to {', '.join(f'train_{s}.py' for s in sorted(others))} (--stage)")
    print(f"\nWhat train_{stage}.py reads, tokens apart by |, {meaning} in brackets:")
    for ids, marks in rows[: cfg.show]:
        more = f" ... {len(ids) - cfg.max_tokens} more" if len(ids) > cfg.max_tokens else ""
        print("\n" + marked(tokenizer, ids[: cfg.max_tokens], marks) + more)
    lengths([len(ids) for ids, _ in rows], block_size, stage)


def vocabulary(cfg):
    """(tokenizer, context) of --init; bytes where nothing is there yet."""
    if cfg.init != "out/gpt" or checkpoint.find(cfg.init):
        _, found = load_gpt(cfg.init, template=cfg.template)
        return found.tokenizer, cfg.block_size or found.model_config.block_size
    print("no model in out/gpt yet: lengths are in bytes; --init gpt2 counts in GPT-2's tokens")
    return byte_tokenizer(), cfg.block_size


def stages_of_file(cfg):
    """The stages that can use every record of --data; prints what the records are read as."""
    shapes, others, usable = Counter(), set(), set(NAMES)
    for record in examples.read([cfg.data], cfg.stage, lambda source, record: record, cfg.columns):
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
    usable = {"gpt"} if examples.record_text(record) is not None else set()
    if examples.first_user_turn(record.get("prompt", record.get("messages", []))):
        usable.add("ppo")
    if any(role == "assistant" for role, _ in examples.demonstration(record) or []):
        usable.add("sft")
    try:
        kind, _, target = examples.judgement(record)
    except Misfit:
        return usable
    is_refused = (kind, target, disliked) == ("thumbs", [0], "refuse")
    return (usable - {"sft"} if is_refused else usable) | {"rm"}


# ---- what each stage makes of it: (a summary, rows of (ids, marks)) ----------------------------


def of_gpt(cfg, tokenizer):
    texts = [text for _, text in examples.read_texts([cfg.data], cfg.columns)]
    rows = [[*ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(texts)]
    summary = f"{len(rows):,} documents, {sum(map(len, rows)):,} tokens"
    return summary, [(ids, [True] * len(ids)) for ids in rows]


def of_sft(cfg, tokenizer):
    demos = examples.load_demonstrations([cfg.data], cfg.columns, cfg.disliked)
    rows = [dialogue.encode_dialogue(tokenizer, e.messages) for e in demos]
    n_turns = sum(role == "assistant" for e in demos for role, _ in e.messages)
    n_tokens = sum(sum(marks) for _, marks in rows)
    return f"{held_out(demos)}, loss on {n_tokens:,} tokens of {n_turns:,} assistant turns", rows


def of_rm(cfg, tokenizer):
    kind, judged = examples.load_feedback([cfg.data], cfg.columns)
    pairs = [(e.messages, c) for e in judged for c in e.completions]
    texts = [dialogue.encode_pair(tokenizer, *pair) for pair in pairs]
    n_labelers = len({e.labeler for e in judged})
    summary = f"{kind} of {len(texts):,} completions by {n_labelers} labeler(s)"
    return f"{held_out(judged)}: {summary}", [(i, [False] * (len(i) - 1) + [True]) for i in texts]


def of_ppo(cfg, tokenizer):
    asked = examples.load_prompts([cfg.data], cfg.columns)
    prompts = [dialogue.encode_prompt(tokenizer, e.messages) for e in asked]
    return f"{held_out(asked)}: prompts to answer", [(i, [False] * len(i)) for i in prompts]


READ = {  # stage -> what reads for it, and what a True in marks means
    "gpt": (of_gpt, "all that carry loss"),
    "sft": (of_sft, "those that carry loss"),
    "rm": (of_rm, "the one at which the score is read"),
    "ppo": (of_ppo, "none"),
}


def held_out(loaded):
    openings, prompts = {e.first_turn for e in loaded}, held_out_prompts(loaded)
    n = sum(e.first_turn in prompts for e in loaded)
    return f"{len(loaded):,} examples, {n:,} held out, {len(openings):,} different first turns"


# ---- output ------------------------------------------------------------------------------------


def marked(tokenizer, ids, marks):
    """Tokens as text with | between them. Marked ones that follow each other share a pair of
    brackets, which is green on a terminal."""
    before, after = ("\033[32m[", "]\033[0m") if sys.stdout.isatty() else ("[", "]")
    runs = []
    for is_marked, run in groupby(zip(ids, marks), lambda pair: pair[1]):
        words = "|".join(tokenizer.token_text(i) for i, _ in run)
        runs.append(before + words + after if is_marked else words)
    return "".join(runs)


def lengths(counts, block_size, stage):
    """How long the rows are, and how many are too long."""
    middle, most = (sorted(counts)[int(share * len(counts))] for share in (0.5, 0.95))
    mean, longest = sum(counts) / len(counts), max(counts)
    print(
        f"\ntokens per row: mean {mean:.1f}, half up to {middle:,}, 95 % up to {most:,}, ", end=""
    )
    print(f"longest {longest:,}")
    if block_size and stage != "gpt" and (over := sum(n > block_size for n in counts)):
        print(
            f"{over:,} of {len(counts):,} exceed the context of {block_size} tokens: prompts "
            "lose their left, and rows whose response alone is longer are left out"
        )
