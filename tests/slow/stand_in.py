"""Stands in for `python` and `torchrun` where test_commands.py types what the documents say: runs
the command at toy size, or leaves it out, and writes down which of the two to the file $TYPED.

    python stand_in.py python train_ppo.py --kl_coef 0      # what the reader typed: the last four
"""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from nanorlhf.config import from_cli, silent

TOY = {  # a flag is added where the program has it, in place of what the reader typed
    "documents": 80,
    "demonstrations": 80,
    "prompts": 16,
    "heldout_prompts": 8,
    "eval_prompts": 4,
    "best_of_prompts": 2,
    "max_steps": 2,
    "batch_size": 4,
    "minibatch_size": 2,
    "grad_accum": 1,
    "vocab_size": 300,
    "n_layer": 1,
    "n_head": 2,
    "d_model": 32,
    "max_new_tokens": 8,
    "sample_tokens": 4,
    "repeats": 1,
    "rows": 4,
    "seq_len": 16,
    "prompt_tokens": 8,
}
# Rejection sampling needs answers that end by themselves, some of them to held-out prompts
MORE = {"experiments.train_rft": {"prompts": 60, "max_new_tokens": 90}}
INPUTS = set("data val_data ptx_data init sft reward gold models runs judge lm".split())


def left_out(program, words):
    """Why a command does not run here; "" if it does."""
    if "ONLY_READ" in os.environ:
        return "what variables stand for is all that is asked"
    if program == "torchrun":
        return "wants many processes"
    if words[:2] in (["-m", "venv"], ["-m", "pip"]):
        return "installs something"
    if words[0] == "examples/make_data.py":
        return "downloads"
    if words[2:3] in (["label"], ["serve"]) and "simulated" not in words:
        return "waits for a person"
    if {"--nanogpt", "--trl"} & set(words):
        return "needs other projects beside it"
    for word in inputs(words):
        path = word.partition("=")[2] or word  # NAME=FOLDER
        if not Path(path.partition(":")[0]).exists():  # my.py:function, hf:owner/name
            return f"{word} is not there"
    return ""


def inputs(words):
    """What a command reads: the first word after the program's name, and the values of INPUTS."""
    flag, name = "", 0  # where the name of the script or the tool stands
    if words[0] == "-m":
        name = 2 if words[1] == "nanorlhf" else 1
    for i, word in enumerate(words[name + 1 :]):
        if word.startswith("-"):
            flag = word.lstrip("-")
        elif flag in INPUTS or i == 0:
            yield word


def program_of(words):
    """(its module's name, its Config or None, its flags), of the words of a command."""
    name, n = words[0].removesuffix(".py"), 1
    if name == "-m":
        n = 3 if words[1] == "nanorlhf" else 2
        name = f"nanorlhf.tools.{words[2]}" if n == 3 else words[1]
    sys.path.insert(0, os.getcwd())
    module = importlib.import_module(name.replace("/", "."))
    if name.endswith("train_lora") and words[n:] and words[n] in module.STAGES:
        return name, module.STAGES[words[n]], words[n + 1 :]
    return name, getattr(module, "Config", None), words[n:]


def without(words, flags):
    """The words but for these flags and their values."""
    kept, flag = [], ""
    for word in words:
        flag = word.partition("=")[0] if word.startswith("--") else flag
        kept += [word] if flag not in flags else []
    return kept


def shrunk(words):
    """The command at toy size: each flag of TOY once, whatever was typed, but for those that idle
    beside the others."""
    name, config, _ = program_of(words)
    fields = {f.name for f in dataclasses.fields(config) if f.init} if config else ()
    toy = {f"--{flag}": str(n) for flag, n in (TOY | MORE.get(name, {})).items() if flag in fields}
    words = [*without(words, toy), *(word for pair in toy.items() for word in pair)]
    while config and (idle := idle_flag(config, program_of(words)[2])):
        words = without(words, [idle])
    return words


def idle_flag(config, flags):
    """The first flag that is refused as it does nothing beside the others; "" if there is none."""
    silent.set(True)
    try:
        from_cli(config, flags)
    except SystemExit as mistake:
        idle = re.match(r"(--\w+) does nothing", str(mistake))
        return idle[1] if idle else ""
    return ""


def main():
    program, *words = sys.argv[1:]
    entry = {"command": " ".join([program, *words]), "left_out": left_out(program, words)}
    status = 0
    if not entry["left_out"]:
        words = shrunk(words)
        done = subprocess.run(
            [sys.executable, *words], stdin=subprocess.DEVNULL, capture_output=True, timeout=300
        )
        status = done.returncode
        entry |= {"status": status, "said": (done.stdout + done.stderr)[-2000:].decode()}
    with open(os.environ["TYPED"], "a") as file:
        file.write(json.dumps(entry) + "\n")
    sys.exit(status)


if __name__ == "__main__":
    main()
