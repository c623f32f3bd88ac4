"""A checkpoint is a folder step_N/: weights.pt, state.pt, config.json and tokenizer.json, or a
folder tokenizer/ with the files of another project's.

In the stage's folder the file `latest` names the newest checkpoint, `best` the one with the lowest
validation loss; others are removed. A step folder is written as `.partial` and gets its name when
it is complete, and the pointers follow. So wherever a run is killed, and if the disk is full, they
name whole checkpoints.

Where a new run begins in a folder that holds an earlier run's checkpoints, these become
earlier_step_N. That is what the pointers stand for until the new run has saved, and nothing that
it could resume from.

Three words of config.json say what a checkpoint is good for, whichever script made it. `stage` is
that script's name for itself, any name. `kind` is "lm" or "reward": what the model computes. `chat`
is true where the model has learned the chat template, false for a base model, which continues text.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from nanorlhf.config import die, doing, once, reason, warn
from nanorlhf.machine import durable, process
from nanorlhf.model import GPTConfig, RewardModel
from nanorlhf.tokenizer import Tokenizer


@dataclass
class Checkpoint:
    path: Path
    stage: str  # "gpt", "sft", "rm", "ppo" or a fork's own name
    kind: str  # one of KINDS
    step: int
    weights: dict  # name -> float32 tensor; empty once `load_model` has put them into a model
    tokenizer: Tokenizer  # or a ForeignTokenizer
    model_config: GPTConfig
    config: dict  # all of config.json


KINDS = {"lm": "a language model", "reward": "a reward model"}
EARLIER = "earlier_"  # before the name of a step folder of the run before


# ---- a stage's folder --------------------------------------------------------------------------


def save(cfg, stage, step, weights, state, tokenizer, model_config, best=0, details=None):
    """Write out_dir/step_N; `latest` then names it, and `best` the checkpoint of step `best`, if
    there is one. Rank 0 writes.

    `details`: what else config.json says, such as `fingerprints` of what the run reads, see
    session.py, or that the model has not learned the chat template, "chat": False.
    """
    if process.rank():
        return
    folder = Path(cfg.out_dir)
    target, partial = folder / f"step_{step}", folder / ".partial"
    kind = "reward" if "score_head.weight" in weights else "lm"  # RewardModel's name for it
    config = {"stage": stage, "kind": kind, "chat": True, "step": step, "commit": process.commit()}
    config |= {"model": asdict(model_config), "flags": asdict(cfg)} | (details or {})
    try:
        if target not in pointed_to(folder):  # else the run was resumed here, and it is saved
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            torch.save(weights, partial / "weights.pt")
            torch.save(state, partial / "state.pt")
            tokenizer.save(partial)
            (partial / "config.json").write_text(json.dumps(config, indent=1))
            for path in (*partial.rglob("*"), partial):
                durable.flush(path)
            shutil.rmtree(target, ignore_errors=True)  # of a save that was killed before it ended
            partial.rename(target)
        point(folder, "best", best)
        point(folder, "latest", step)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        shutil.rmtree(partial, ignore_errors=True)
        die(f"{target}: could not be written ({reason(error)}); the last good checkpoint is kept")
    steps = {*folder.glob("step_*"), *folder.glob(f"{EARLIER}step_*")}
    for path in steps - {*pointed_to(folder)}:
        shutil.rmtree(path, ignore_errors=True)


def point(folder, pointer, step):
    """Point `latest` or `best` to the checkpoint of a step. Where there is none, as for the best of
    a stage that has no validation loss, the pointer goes."""
    if (folder / f"step_{step}").exists():
        durable.write_text(folder / pointer, f"step_{step}")
    else:
        (folder / pointer).unlink(missing_ok=True)


def pointed_to(folder):
    """The step folders that `latest` and `best` stand for."""
    return [find(folder, pointer) for pointer in ("latest", "best")]


def set_aside(folder):
    """A new run begins: rename an earlier one's step folders, the newest first. From then on there
    is nothing that a run could resume from."""
    for path in pointed_to(folder):
        if path and path.exists() and not path.name.startswith(EARLIER):
            shutil.rmtree(folder / (EARLIER + path.name), ignore_errors=True)
            path.rename(folder / (EARLIER + path.name))


def newest(folder):
    """The step folder from which the run in a stage's folder can go on, or None before its first
    save."""
    path = find(folder, "latest")
    return None if path is None or path.name.startswith(EARLIER) else path


def find(folder, prefer="best"):
    """The step folder that `folder` stands for: itself, if it is one; else the one that its file
    `prefer` names, or its file `latest`. None where there is no such file."""
    folder = Path(folder)
    if (folder / "weights.pt").exists():
        return folder
    for pointer in (prefer, "latest"):
        if (folder / pointer).exists():
            path = folder / (folder / pointer).read_text().strip()
            earlier = folder / (EARLIER + path.name)
            return earlier if earlier.exists() and not path.exists() else path
    return None


# ---- reading -----------------------------------------------------------------------------------


def config_of(run):
    """config.json of the newest checkpoint of a run: its stage, "flags", ...; before its first one
    it has no flags."""
    path = find(run, "latest")
    try:
        config = json.loads((path / "config.json").read_text()) if path else {"flags": {}}
        return config | {"flags": dict(config["flags"])}
    except (OSError, ValueError, LookupError, TypeError) as error:
        die(f"{path / 'config.json'}: {reason(error)}")


def load(folder, kind=None, prefer="best", as_saved=False):
    """The Checkpoint at `folder`, see `find`, with thin matrices `merged`, unless `as_saved`. Exits
    2 with the reason where it cannot be used, or where it is not of the `kind` that is asked
    for."""
    assert kind in (None, *KINDS), f"{kind} is none of {', '.join(KINDS)}"
    path = find(folder, prefer)
    if path is None:
        stage = "rm" if kind == "reward" else Path(folder).name
        stage = stage if stage in ("gpt", "sft", "rm", "ppo") else "{gpt,sft,ppo}"
        die(f"{folder}: no checkpoint there; train_{stage}.py makes one")
    try:
        config = json.loads((path / "config.json").read_text())
        if "stage" in config and "kind" not in config:
            die(f"{path}: of an early format, which is no longer read; make it again")
        own_kind, in_words = config["kind"], KINDS[config["kind"]]
        if kind not in (None, own_kind):
            die(f"{path}: {in_words}; this needs {KINDS[kind]}")
        if (path / "weights.pt").stat().st_size > 1e8:
            doing(f"loading {path}")
        weights = {k: w.float() for k, w in durable.read_tensors(path / "weights.pt").items()}
        weights = weights if as_saved else merged(weights)
        tokenizer = load_tokenizer(path)
        model_config = config_from(config["model"])
        stage, step, tokenizer.chat = config["stage"], int(config["step"]), config["chat"]
        if mistake := config.get("flags", {}).get("mistake"):
            once(warn, f"{path}: broken on purpose, by --mistake {mistake}")
    except Exception as error:  # a damaged file raises whatever it makes a reader stumble over
        die_of_damage(path, error)
    if tokenizer.vocab_size != model_config.vocab_size:
        die(f"{path}: tokenizer of {tokenizer.vocab_size}, model of {model_config.vocab_size} ids")
    return Checkpoint(path, stage, own_kind, step, weights, tokenizer, model_config, config)


def merged(weights):
    """W + scale * B A in place of each W that has thin matrices beside it: LoRA's, see
    experiments/train_lora.py."""
    for name in [name.removesuffix(".scale") for name in weights if name.endswith(".scale")]:
        A, B, scale = (weights.pop(f"{name}.{thin}") for thin in ("A", "B", "scale"))
        weights[f"{name}.weight"] += scale * B @ A
    return weights


def config_from(saved):
    """The config that a checkpoint's "model" describes."""
    if "n_kv_head" not in saved:
        return GPTConfig(**saved)
    from nanorlhf.llama import LlamaConfig  # here: who trains a GPT-2 need not read it

    return LlamaConfig(**saved)


def load_tokenizer(path):
    """The Tokenizer, or another project's, with which a step folder was written."""
    if not (path / "tokenizer").is_dir():
        return Tokenizer.load(path)
    from nanorlhf.hf.tokenizer import ForeignTokenizer  # here: who starts from nothing needs none

    return ForeignTokenizer.load(path)


def die_of_damage(path, error):
    """Exit 2 over a checkpoint that cannot be read, and say which other one there is."""
    message = f"{path}: not a whole checkpoint ({type(error).__name__}: {reason(error)})"
    others = [p.name for p in path.parent.glob("*step_*") if p != path]
    if others:
        message += f"; to use {others[0]}, write that into {path.parent}/latest or best"
    die(message)


def load_model(folder, kind=None, dropout=0.0):
    """(GPT or RewardModel in float32, Checkpoint) of a checkpoint of this kind, or of any. A critic
    that was saved with a language model is left out. Dropout is each stage's own choice, so the
    checkpoint's is not taken over."""
    checkpoint = load(folder, kind)
    checkpoint.model_config.dropout = dropout
    is_lm, weights = checkpoint.kind == "lm", checkpoint.weights
    try:
        with torch.device("meta"):  # takes no memory: the weights come next
            gpt = checkpoint.model_config.build()
            model = gpt if is_lm else RewardModel(gpt)
    except Exception as error:  # sizes in a damaged file may be anything
        die_of_damage(checkpoint.path, error)
    restore(model, gpt_weights(weights) if is_lm else weights, checkpoint.path)
    checkpoint.weights = {}  # else they would stay in memory for the whole run
    return model, checkpoint


def gpt_weights(weights):
    """The weights of the language model alone. RewardModel and ActorCritic prefix its names with
    "gpt."; a plain GPT does not."""
    inside = {k.removeprefix("gpt."): w for k, w in weights.items() if k.startswith("gpt.")}
    return inside or weights


def restore(model, weights, path):
    """Put weights into a model; exits 2 where they do not fit."""
    check_sizes(model, weights, path)
    model.load_state_dict(weights, assign=True)


def check_sizes(model, weights, path):
    """Exits 2 where weights do not fit a model, and names the first tensor that differs."""
    both = [{name: w.shape for name, w in x.items()} for x in (model.state_dict(), weights)]
    for name in both[0] | both[1]:
        wanted, given = (shapes.get(name) for shapes in both)
        if wanted != given:
            die(f"{path}: tensor {name} has shape {given}; this model takes {wanted}")


def same_vocabulary(a, b):
    """Exits 2 where two checkpoints that work together have different vocabularies."""
    if a.tokenizer != b.tokenizer:
        die(f"{a.path} and {b.path} have different vocabularies: they are of different runs")
