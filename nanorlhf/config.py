"""One dataclass field is one command-line flag: typed, with a default and a line of help.

    @dataclass
    class Config(TrainConfig):
        "First line of --help."
        gamma: float = arg(1.0, "discount per token")

    if __name__ == "__main__":
        main(from_cli(Config))

The flags that every stage shares are fields of TrainConfig.
"""

import argparse
import dataclasses
import io
import os
import signal
import sys
import time
import typing
from collections import Counter
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

LARGEST = 2**32 - 1  # of any number that a flag takes: beyond it something overflows, late
silent = ContextVar("silent", default=False)  # whether a mistake is raised without being printed
said = set()  # what `once` has said


def arg(default, help, choices=None, positional=False, low=None, high=LARGEST):
    """A dataclass field that is also a flag; a number must be from `low` to `high`, and an int
    that is not 0 by default counts something: from 1. List defaults are copied."""
    low = int(type(default) is int and default > 0) if low is None else low
    metadata = {"help": help, "choices": choices, "positional": positional, "range": (low, high)}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def template_flag():
    """--template of every program that reads a model in Hugging Face layout."""
    about = "chat template of a model in Hugging Face layout; default: its own"
    return arg("", about, choices=("", "nanorlhf", "chatml", "llama3"))


def world_size():
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank():
    """Which of them this one is, from 0."""
    return int(os.environ.get("RANK", 0))


class Mistake(SystemExit):
    """A mistake of the user's, in one line. It ends the program with exit status 2."""

    def __init__(self, message):
        super().__init__(message)
        self.code = 2


def die(message):
    """End the program for a user's mistake: one clear line on stderr, exit status 2."""
    message = " ".join(message.splitlines())  # a file's name may hold a line break
    if not silent.get():
        if rank():  # rank 0 first: what all die of is said once, as torchrun then ends the others
            time.sleep(3)
            message = f"rank {rank()}: {message}"
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise Mistake(message)


@contextmanager
def mistakes_as_value_errors():
    """For whoever calls this project from Python: a mistake inside ends nothing and prints nothing,
    but raises ValueError with its line."""
    before = silent.set(True)
    try:
        yield
    except Mistake as mistake:
        raise ValueError(str(mistake)) from None
    finally:
        silent.reset(before)


def warn(message):
    if rank() == 0:
        print(f"warning: {message}", file=sys.stderr, flush=True)


def note(message):
    if rank() == 0:  # a file's columns may be named as nothing can print
        print(message.encode(errors="backslashreplace").decode(), flush=True)


def once(say, message):
    """warn or note, but only once: a file may be read several times."""
    if message not in said:
        said.add(message)
        say(message)


def reason(error):
    """What an exception says, in one line: the system's own words, where it was the system's."""
    for e in (error, error.__context__):
        if getattr(e, "strerror", None):
            return e.strerror
    return str(error).strip().split("\n")[0] or type(error).__name__


def within(kind, low, high):
    """The type of a flag as argparse takes it: a number from low to high, and so no nan or inf."""

    def number(word):
        if low <= kind(word) <= high:
            return kind(word)
        raise argparse.ArgumentTypeError(f"{word} is not a number from {low} to {high}")

    number.__name__ = kind.__name__  # argparse names it where a word is none at all
    return number


def from_cli(config_class, argv=None):
    """Parse flags (words, for positional fields) into `config_class`; bad input exits 2."""
    signal.signal(signal.SIGINT, interrupted)
    outlast_readers()
    show = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(
        description=config_class.__doc__, allow_abbrev=False, formatter_class=show
    )
    parser.error = lambda message: die(f"{message}; --help lists the flags")
    types = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind, flag = types[field.name], "--" + field.name
        many = typing.get_origin(kind) is list
        kind = typing.get_args(kind)[0] if many else kind
        default = field.default_factory() if many else field.default
        options = {"help": field.metadata["help"], "default": default}
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
            continue
        options["type"] = kind if kind is str else within(kind, *field.metadata["range"])
        if field.metadata["positional"]:
            parser.add_argument(field.name, nargs="*" if many else "?", **options)
        else:
            options |= {"choices": field.metadata["choices"], "nargs": "*" if many else None}
            parser.add_argument(flag, action=Extend if many else "store", **options)
    refuse_repetitions(config_class, sys.argv[1:] if argv is None else argv)
    return config_class(**vars(parser.parse_args(argv)))


class Extend(argparse.Action):
    """--data a --data b is --data a b. The first use replaces the default."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if before is self.default else before + values)


def refuse_repetitions(config_class, argv):
    """Any other flag that is given twice would silently be its last value."""
    given = Counter(
        word.partition("=")[0].replace("--no-", "--") for word in argv if word.startswith("--")
    )
    for field in dataclasses.fields(config_class):
        if given["--" + field.name] > 1 and field.default is not dataclasses.MISSING:
            die(f"--{field.name} is given {given['--' + field.name]} times")


def interrupted(signum, frame):
    if rank() == 0:
        print("\ninterrupted", file=sys.stderr)
    raise SystemExit(128 + signum)


class Outlasting(io.FileIO):
    """A stream whose reader may go, as a closed terminal and `| head` do. What is written then is
    lost, and the program goes on."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError:
            return len(data)


def outlast_readers():
    """Make standard output and errors Outlasting; and where one is closed from the start, a file
    for which the same is true. Any text of the user's can be printed."""
    for name in ("stdout", "stderr"):
        was = getattr(sys, name)
        if was is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif was is getattr(sys, f"__{name}__"):
            raw = io.BufferedWriter(Outlasting(was.fileno(), "w", closefd=False))
            how = {"line_buffering": was.line_buffering, "write_through": was.write_through}
            setattr(sys, name, io.TextIOWrapper(raw, was.encoding, "backslashreplace", **how))
        elif isinstance(was, io.TextIOWrapper):  # captured, by a test
            was.reconfigure(errors="backslashreplace")


@dataclass
class TrainConfig:
    """Flags that every stage shares; a stage overrides a default by declaring the field again."""

    out_dir: str = arg("out/stage", "folder for this stage's checkpoints, metrics and samples")
    seed: int = arg(1, "fixes data order, initial weights, sampling and the embedded world", low=0)
    device: str = arg("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    dtype: str = arg(
        "auto",
        "compute precision; auto is bfloat16 where the hardware multiplies it fast",
        choices=("auto", "float32", "bfloat16"),
    )
    max_steps: int = arg(0, "optimizer steps")
    batch_size: int = arg(32, "sequences per optimizer step")
    grad_accum: int = arg(1, "split each step into this many micro-batches to save memory")
    grad_checkpointing: bool = arg(False, "save more: keep each block's input, recompute the rest")
    shard: bool = arg(False, "under torchrun: split weights and AdamW's state up (FSDP2)")
    learning_rate: float = arg(1e-3, "peak learning rate")
    warmup_steps: int = arg(20, "steps of linear warm-up", low=0)
    weight_decay: float = arg(0.1, "AdamW decay, on matrices only")
    grad_clip: float = arg(1.0, "largest norm of the gradient", low=1e-6)
    eval_every: int = arg(100, "steps between evaluations on held-out data")
    save_every: int = arg(100, "steps between checkpoints")
    template: str = template_flag()
    max_seq_len: int = arg(
        0,
        "stages 2 to 4: tokens of a dialogue at most, a longer one loses its left; 0: "
        "the model's context",
    )
    columns: list[str] = arg([], "rename columns of --data, as in prompt=question chosen=best")
    resume: bool = arg(False, "go on from the newest checkpoint in --out_dir")
    resume_anyway: bool = arg(False, "with --resume: although flags have changed since then")
    keep: int = arg(1, "newest checkpoints kept beside the best one")
    check: bool = arg(True, "check a new run's masks, cache, heads, gradients; docs/trouble.md")
    tensorboard: bool = arg(False, "also write TensorBoard events (pip install tensorboard)")
