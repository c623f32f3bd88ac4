"""What the README types and names exists: commands, flags, files, functions."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from nanorlhf import functional
from nanorlhf.__main__ import COMMANDS as COMMANDS_OF_TOOLS
from nanorlhf.config import from_cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```\n(.*?)```", README, re.S)
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = [line.partition("#")[0] for line in LINES if re.match(r"(\.venv/bin/)?python ", line)]
COMMANDS += [re.sub(r"^torchrun( --\S+)+", "python", x) for x in LINES if x.startswith("torchrun")]
COMMANDS += re.findall(r"`((?:\.venv/bin/)?python [^`]*)`", README)


def config_of(words):
    """The Config that reads a command's flags, and those flags; None for a plain script."""
    if words[1] == "-m":
        return importlib.import_module(f"nanorlhf.tools.{words[3]}").Config, words[4:]
    if words[1].startswith("train_"):
        return importlib.import_module(words[1].removesuffix(".py")).Config, words[2:]
    if words[1] == "examples/sentiment.py":
        return importlib.import_module("examples.sentiment").Config, words[2:]
    return None, words[2:]


def test_the_readme_has_commands():
    assert len(COMMANDS) > 15


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_in_the_readme_is_one_that_its_program_takes(command):
    words = shlex.split(command)
    config, flags = config_of(words)
    if config is None:
        assert (ROOT / words[1]).is_file(), command
    else:
        from_cli(config, flags)  # exits 2 for a flag or a value that it does not know


def test_every_flag_in_the_readme_exists():
    tools = [f"nanorlhf.tools.{name}" for name in COMMANDS_OF_TOOLS]
    stages = [f"train_{stage}" for stage in ("gpt", "sft", "rm", "ppo")] + ["examples.sentiment"]
    configs = [importlib.import_module(name).Config for name in tools + stages]
    known = {name for config in configs for name in config.__dataclass_fields__}
    torchruns = {"standalone", "nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint"}
    mentioned = set(re.findall(r"--(?:no-)?([a-z_]+)", README)) - {"help"} - torchruns
    assert mentioned <= known, mentioned - known


def test_every_file_and_function_that_the_readme_names_exists():
    tree = next(block for block in BLOCKS if "train_ppo.py   " in block)
    for name in re.findall(r"[\w/]+\.(?:py|txt)|[\w]+/[\w/]*", tree):
        assert any((ROOT / f / name).exists() for f in (".", "nanorlhf", "examples")), name
    table = README.split("## The four stages")[1].split("\n## ")[0]
    for name in re.findall(r"`(\w+(?:_loss|_rewards|gae))`", table):
        assert name == "val_loss" or hasattr(functional, name), name
    for picture in re.findall(r"\]\((docs/\w+\.png)\)", README):
        assert (ROOT / picture).is_file(), picture
