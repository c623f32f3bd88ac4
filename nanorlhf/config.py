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
import re
import sys
import time
import typing
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib import import_module

from nanorlhf.machine import process
from nanorlhf.machine.process import rank

LARGEST = 2**32 - 1  # of any number that a flag takes: beyond it something overflows, late
# how --help groups the flags of a stage; those of no other group are the stage's own
FIRST = "init data reward out_dir max_steps epochs batch_size learning_rate kl_coef seed resume"
DATA = "val_data val_examples columns template max_seq_len disliked ptx_data"
MACHINE = "device dtype compile grad_accum grad_checkpointing shard"
GROUPS = {"what to change first": FIRST, "of this stage": "", "data": DATA, "machine": MACHINE}
silent = ContextVar("silent", default=False)  # mistakes are raised, and nothing is printed
# what a terminal obeys in place of showing it: control characters but for tab and line break, marks
# that turn the direction of writing, and half characters, which cannot be printed at all
OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


# ---- what a program says -----------------------------------------------------------------------


class Mistake(SystemExit):
    """A mistake of the user's, in one line. It ends the program."""

    code = 2  # the exit status


def visible(text):
    """A text of a model or a file as it can be printed on a terminal: what would move the cursor,
    hide other text or colour it is shown as \\x1b."""
    return OBEYED.sub(lambda match: ascii(match[0])[1:-1], text)


def die(message):
    """End the program for a user's mistake: one clear line on stderr, exit status 2."""
    message = visible(" ".join(message.splitlines()))  # a file's name may hold a line break
    if not silent.get():
        if rank():  # rank 0 first: what all die of is said once, as torchrun then ends the others
            time.sleep(3)
            message = f"rank {rank()}: {message}"
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise Mistake(message)


def warn(message):
    if rank() == 0:
        print(f"warning: {visible(message)}", file=sys.stderr, flush=True)


def note(message):
    """Print a message, as `visible` shows it: in this way everything is printed that may hold the
    text of a model or of a file."""
    if rank() == 0 and not silent.get():
        print(visible(message), flush=True)


def doing(what):
    """Say what a program does next, where that may take longer than ten seconds."""
    note(f"{what} ...")


@cache
def once(say, message):
    """warn or note, but only once: a file may be read several times."""
    say(message)


def reason(error):
    """What an exception says, in one line: the system's own words, where it was the system's."""
    for e in (error, error.__context__):
        if getattr(e, "strerror", None):
            return e.strerror
    return str(error).strip().split("\n")[0] or type(error).__name__


def package(name, what, extra):
    """A package of an extra, which `what` needs."""
    try:
        return import_module(name)
    except ImportError:
        die(f"{what} needs {name}: pip install -e '.[{extra}]'")


# ---- flags -------------------------------------------------------------------------------------


def arg(default, help, choices=None, positional=False, low=None, high=LARGEST):
    """A dataclass field that is also a flag; a number must be from `low` to `high`, and an int
    that is not 0 by default counts something: from 1. List defaults are copied."""
    low = int(type(default) is int and default > 0) if low is None else low
    metadata = {"help": help, "choices": choices, "positional": positional, "range": (low, high)}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def gone(default):
    """A flag of the stage that a fork has no use for: it keeps its value, and is not offered."""
    return dataclasses.field(default=default, init=False, metadata={"choices": None})


def is_function(spec):
    """Whether a flag names a user's function, path.py:name, and not a folder."""
    return ".py:" in spec or spec.endswith(".py")


def template_flag():
    """--template of every program that reads a model in Hugging Face layout."""
    help = "chat template of another's model: nanorlhf, chatml, a Jinja file; default: its own"
    return arg("", help)


def within(kind, low, high):
    """The type of a flag as argparse takes it. A number is from low to high: no nan, no inf."""

    def value_of(word):
        if kind is str or low <= kind(word) <= high:
            return kind(word)
        raise argparse.ArgumentTypeError(f"{word} is not a number from {low} to {high}")

    return value_of


def from_cli(config_class, argv=None):
    """Parse flags (words, for positional fields) into `config_class`; bad input exits 2."""
    process.start()
    words = sys.argv[1:] if argv is None else argv
    # a flag that is not given has no value here, and so the field's default
    rules = {"allow_abbrev": False, "argument_default": argparse.SUPPRESS}
    parser = argparse.ArgumentParser(description=config_class.__doc__, **rules)
    parser.error = lambda message: die(f"{message}; --help lists the flags")
    is_stage = issubclass(config_class, TrainConfig)
    groups = {title: parser.add_argument_group(title) if is_stage else parser for title in GROUPS}
    types, defaults = typing.get_type_hints(config_class), config_class()
    for field in (field for field in dataclasses.fields(config_class) if field.init):
        name, meta = field.name, field.metadata
        (kind,) = typing.get_args(types[name]) or [types[name]]  # list[str] holds str
        options = {"help": f"{meta['help']} (default: {getattr(defaults, name)})"}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": within(kind, *meta["range"]), "choices": meta["choices"]}
        if kind is not types[name]:  # --data a --data b is --data a b
            options |= {"nargs": "*", "action": "extend"}
        elif meta["positional"]:
            options["nargs"] = "?"
        elif sum(word.partition("=")[0] == "--" + name for word in words) > 1:
            die(f"--{name} is given twice, and would silently be its last value")
        title = next((t for t in GROUPS if name in GROUPS[t].split()), "of this stage")
        groups[title].add_argument(name if meta["positional"] else "--" + name, **options)
    given = vars(parser.parse_args(words))
    cfg = config_class(**given)
    refuse_idle(cfg, given.keys())
    return cfg


def refuse_idle(cfg, given):
    """Exits 2 for a flag among those `given` that nothing reads beside the others. A config's class
    and the classes it stands on say in IDLE which: "a b: c=x d; ..." means that --a and --b are
    idle where --c is x and --d is set. An x of 0 stands for whatever is empty."""
    tables = [vars(kind)["IDLE"] for kind in type(cfg).__mro__ if "IDLE" in vars(kind)]
    for flags, where in (rule.split(": ") for rule in "; ".join(tables).split("; ") if rule):
        wanted = dict(word.partition("=")[::2] for word in where.split())
        values = {name: getattr(cfg, name, None) for name in wanted}
        if all(str(values[n] or 0) == x if x else values[n] for n, x in wanted.items()):
            words = " and ".join(f"--{name} is {value!r}" for name, value in values.items())
            for flag in flags.split():
                if flag in given:
                    die(f"--{flag} does nothing where {words}")


@dataclass(kw_only=True)  # a command's own words come first: inspect.Config("out/ppo")
class DeviceConfig:
    """Flags of every program that computes, see machine/device.py."""

    device: str = arg("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    dtype: str = arg("auto", "auto: bfloat16 where it is fast", ("auto", "float32", "bfloat16"))


@dataclass
class TrainConfig(DeviceConfig):
    """Flags that every stage shares; a stage overrides a default by declaring the field again."""

    IDLE = (  # what several stages and forks have, and PPO's; see `refuse_idle`
        "epochs: max_steps; columns: data=0 val_data=0; vf_coef cliprange_value: critic=none; "
        "cliprange_value: vf_coef=0; kl_target: kl_coef=0; missing_eos_score: score_unended; "
        "ptx_data: ptx_coef=0"
    )
    out_dir: str = arg("out/stage", "folder for this stage's checkpoints, metrics and samples")
    seed: int = arg(1, "fixes data order, initial weights, sampling and the embedded world", low=0)
    compile: bool = arg(False, "torch.compile, for long runs on a GPU; docs/machines.md")
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
    max_seq_len: int = arg(0, "longest dialogue in tokens, loses its left; 0: the model's context")
    columns: list[str] = arg([], "rename columns of --data, as in prompt=question chosen=best")
    resume: bool = arg(False, "go on from the newest checkpoint in --out_dir")
    check: bool = arg(True, "check a new run's masks, cache, heads, gradients; docs/trouble.md")
    mistake: str = arg("", "break this run on purpose: a famous mistake's name, list, hunt, reveal")

    def __post_init__(self):
        """A flag that takes several words may be given one, in Python too."""
        for name, kind in typing.get_type_hints(type(self)).items():
            if kind is not str and isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
