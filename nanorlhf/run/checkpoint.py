"""A checkpoint is a folder step_N/: weights.pt, state.pt, tokenizer.json, config.json and their
SHA256SUMS.

In the stage's folder the file `latest` names the newest whole checkpoint, `best` the one with the
lowest validation loss. These two and the --keep newest stay; the others are removed. A folder gets
its name only when it is complete, so a run that is killed, or a disk that is full, costs the newest
steps and never an earlier checkpoint.

Three words of config.json say what a checkpoint is good for, whichever script made it. `stage` is
that script's name for itself, any name. `kind` is "lm" or "reward": what the model computes. `chat`
is true where the model has learned the chat template, false for a base model, which continues text.
"""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from nanorlhf.config import die, rank, reason
from nanorlhf.hf.folder import checked, read_bin
from nanorlhf.llama import config_from, make_gpt
from nanorlhf.machine import durable, process
from nanorlhf.model import GPTConfig, RewardModel
from nanorlhf.tokenizer import Tokenizer


@dataclass
class Checkpoint:
    path: Path
    stage: str  # "gpt", "sft", "rm", "ppo" or a fork's own name
    kind: str  # one of KINDS
    chat: bool  # has learned the chat template
    step: int
    weights: dict  # name -> float32 tensor; empty once `load_model` has put them into a model
    tokenizer: Tokenizer
    model_config: GPTConfig
    config: dict  # all of config.json

    def __post_init__(self):
        self.tokenizer.template = self.tokenizer.style if self.chat else None


KINDS = {"lm": "a language model", "reward": "a reward model"}


def save(cfg, stage, step, weights, state, tokenizer, model_config, first, best, about=None):
    """Write out_dir/step_N, and point `latest` to it; if `best`, then `best` too. Rank 0 writes.

    `first`: this is the run's first checkpoint, so an earlier run's are removed now, and not
    before. `about`: what else config.json says: `fingerprints` of what the run reads, see
    session.py, and whether the model has learned the chat template, `chat`.
    """
    if rank():
        return
    folder = Path(cfg.out_dir)
    target, partial = folder / f"step_{step}", folder / f".step_{step}.partial"
    config = {
        "stage": stage,
        "kind": "reward" if "score_head.weight" in weights else "lm",  # RewardModel's name for it
        "chat": True,
        "step": step,
        "model": dataclasses.asdict(model_config),
        "flags": dataclasses.asdict(cfg),
        "fingerprints": {},
        "commit": process.commit(),
    } | (about or {})
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, contents in (("weights.pt", weights), ("state.pt", state)):
            with (partial / name).open("wb") as file:
                torch.save(contents, file)
        tokenizer.save(partial / "tokenizer.json")
        (partial / "config.json").write_text(json.dumps(config, indent=1))
        durable.seal(partial)
        durable.swap(partial, target)
        # `best` first: a run that is killed in between resumes before this step, and saves it again
        if best:
            _write_pointer(folder / "best", target.name)
        elif first:
            (folder / "best").unlink(missing_ok=True)
        _write_pointer(folder / "latest", target.name)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        shutil.rmtree(partial, ignore_errors=True)
        die(f"{target}: could not be written ({reason(error)}); the last good checkpoint is kept")
    stay = {p.read_text() for p in (folder / "latest", folder / "best") if p.exists()}
    if not first:
        newest = [path.name for path in all_of(folder) if step_of(path) <= step]
        stay |= set(newest[: cfg.keep])
    for path in (*folder.glob("step_*"), *folder.glob(".step_*.*")):
        if path.name not in stay:
            shutil.rmtree(path, ignore_errors=True)


def _write_pointer(path, name):
    durable.write(path, lambda partial: partial.write_text(name))


def point_best(folder, step):
    """Point `best` to the checkpoint of a step, where it is still there. A run that resumes at an
    older checkpoint goes back to the best one of that time."""
    if (folder / f"step_{step}").is_dir():
        _write_pointer(folder / "best", f"step_{step}")
    else:
        (folder / "best").unlink(missing_ok=True)


def step_of(path):
    return int(path.name.removeprefix("step_"))


def all_of(folder):
    """The checkpoints in a stage's folder, the newest first."""
    latest = find(folder, "latest")
    if latest is None:
        return []
    numbered = [path for path in folder.glob("step_*") if path.name[5:].isdigit()]
    newest_first = sorted(numbered, key=step_of, reverse=True)
    return list(dict.fromkeys([latest, *newest_first]))  # `latest` comes once, and first


def find(folder, prefer="best"):
    """The step folder that `folder` stands for: itself, if it is one; else the one that its file
    `prefer` names, or its file `latest`. None where there is no such file."""
    folder = Path(folder)
    if (folder / "weights.pt").exists():
        return folder
    for pointer in dict.fromkeys((prefer, "latest")):
        if (folder / pointer).exists():
            path = folder / (folder / pointer).read_text(errors="replace").strip()[:99]
            older = durable.replaced(path)
            if older.exists() and not path.exists():
                return older  # a save was killed between its two renames
            return path
    return None


def load(folder, kind=None, prefer="best"):
    """The Checkpoint at `folder`, see `find`. Exits 2 with the reason where it cannot be used, or
    where it is not of the `kind` that is asked for."""
    assert kind in (None, *KINDS), f"{kind} is none of {', '.join(KINDS)}"
    path = find(folder, prefer)
    if path is None:
        die(f"{folder}: no checkpoint there; {who_makes(folder, kind)} makes one")
    damage = durable.damage(path, ("weights.pt", "tokenizer.json", "config.json"))
    if damage:
        die(f"{path}: not a whole checkpoint ({damage})")
    try:
        config = json.loads((path / "config.json").read_text())
        stage, found_kind, chat = what_it_is(config)
        if kind not in (None, found_kind):
            die(f"{path}: {KINDS[found_kind]}; this needs {KINDS[kind]}")
        weights = {name: w.float() for name, w in read_bin(path / "weights.pt").items()}
        tokenizer = Tokenizer.load(path / "tokenizer.json")
        model_config = checked(config_from(config["model"]))
        step = int(config["step"])
    except Exception as error:  # a damaged file raises whatever it makes a reader stumble over
        die(f"{path}: not a whole checkpoint ({type(error).__name__}: {reason(error)})")
    if tokenizer.vocab_size != model_config.vocab_size:
        die(f"{path}: tokenizer of {tokenizer.vocab_size}, model of {model_config.vocab_size} ids")
    return Checkpoint(path, stage, found_kind, chat, step, weights, tokenizer, model_config, config)


def what_it_is(config):
    """(stage, kind, chat) of config.json. Older checkpoints say their stage alone, from which the
    other two follow."""
    stage = config["stage"]
    kind = config.get("kind", "reward" if stage == "rm" else "lm")
    chat = config.get("chat", stage != "gpt")
    if type(stage) is not str or kind not in list(KINDS) or type(chat) is not bool:
        raise ValueError(f"stage {stage!r}, kind {kind!r}, chat {chat!r}")
    return stage, kind, chat


def ancestors(found):
    """Yields config.json of the checkpoint, of the one it started from, and so on as far back as
    they still exist."""
    config, path, seen = found.config, found.path, set()
    while path and path.parent.resolve() not in seen:  # a fork may start from its own folder
        yield config
        seen.add(path.parent.resolve())
        path = find(config.get("flags", {}).get("init") or "nowhere")
        config = json.loads((path / "config.json").read_text()) if path else {}


def who_makes(folder, kind):
    """The scripts that make a checkpoint of a kind; or the one that a folder of this name is of."""
    stages = {"lm": ("gpt", "sft", "ppo"), "reward": ("rm",)}.get(kind, ("gpt", "sft", "rm", "ppo"))
    name = Path(folder).name
    if name in stages:
        stages = (name,)
    return " or ".join(f"train_{stage}.py" for stage in stages)


def load_gpt(folder, dropout=0.0):
    """(GPT in float32, Checkpoint) of a language model; a critic saved with it is left out. Dropout
    is each stage's own choice, so the checkpoint's is not taken over."""
    return load_model(folder, "lm", dropout)


def load_reward_model(folder):
    """(RewardModel in float32, Checkpoint)."""
    return load_model(folder, "reward")


def load_model(folder, kind=None, dropout=0.0):
    """(GPT or RewardModel in float32, Checkpoint) of a checkpoint of this kind, or of any."""
    found = load(folder, kind)
    found.model_config.dropout = dropout
    is_lm = found.kind == "lm"
    # on "meta" no memory is taken: the sizes in a damaged file may be larger than any machine's
    with torch.device("meta"):
        gpt = make_gpt(found.model_config)
        model = gpt if is_lm else RewardModel(gpt)
    restore(model, gpt_weights(found.weights) if is_lm else found.weights, found.path)
    found.weights = {}  # else they would stay in memory for the whole run
    return model, found


def gpt_weights(weights):
    """The weights of the language model alone. A model that holds it beside a head or a critic, as
    RewardModel and ActorCritic do, calls it `gpt`."""
    inside = {k.removeprefix("gpt."): w for k, w in weights.items() if k.startswith("gpt.")}
    return inside or weights


def restore(model, weights, path):
    """Put weights into a model; exits 2 where they do not fit."""
    check_sizes(model, weights, path)
    model.load_state_dict(weights, assign=True)


def check_sizes(model, weights, path):
    """Exits 2 where weights do not fit a model, and names the first tensor that differs."""
    unused = {name: tuple(w.shape) for name, w in weights.items()}
    for name, w in model.state_dict().items():
        if unused.pop(name, None) != tuple(w.shape):
            die(f"{path}: tensor {name} is missing or has another shape than {tuple(w.shape)}")
    if unused:
        die(f"{path}: tensor {next(iter(unused))} has no place in this model")


def same_vocabulary(a, b):
    """Exits 2 where two checkpoints that work together have different vocabularies."""
    if a.tokenizer != b.tokenizer:
        die(f"{a.path} and {b.path} have different vocabularies: they are of different runs")
