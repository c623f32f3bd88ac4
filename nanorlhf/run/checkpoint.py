"""A checkpoint is a folder step_N/: weights.pt, state.pt, tokenizer.json, config.json and their
SHA256SUMS.

In the stage's folder the file `latest` names the newest whole one, `best` the one with the lowest
validation loss; others are removed. A folder gets its name only when it is complete, so a run
that is killed, or a disk that is full, costs the newest steps and never an earlier checkpoint.
"""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from nanorlhf.config import die, rank, reason
from nanorlhf.data.dialogue import TEMPLATE
from nanorlhf.hf.folder import checked, read_bin
from nanorlhf.machine import durable, process
from nanorlhf.model import GPT, GPTConfig, RewardModel
from nanorlhf.tokenizer import Tokenizer


@dataclass
class Checkpoint:
    path: Path
    stage: str  # "gpt", "sft", "rm" or "ppo"
    step: int
    weights: dict  # name -> float32 tensor; empty where a model has them
    tokenizer: Tokenizer
    model_config: GPTConfig
    config: dict  # all of config.json

    def __post_init__(self):
        self.tokenizer.template = None if self.stage == "gpt" else TEMPLATE


def save(cfg, stage, step, weights, state, tokenizer, model_config, first, best, prints=None):
    """Write out_dir/step_N and point `latest`, and if `best` also `best`, to it. `first`: this is
    a run's first checkpoint, so what an earlier run left in the folder goes now, and not before.
    `prints`: fingerprints of what the run reads. Rank 0 writes."""
    if rank():
        return
    folder = Path(cfg.out_dir)
    target, partial = folder / f"step_{step}", folder / f".step_{step}.partial"
    config = {
        "stage": stage,
        "step": step,
        "model": dataclasses.asdict(model_config),
        "flags": dataclasses.asdict(cfg),
        "fingerprints": prints or {},
        "commit": process.commit(),
    }
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
        # best first: a run that is killed before `latest` does this step again
        if best:
            _point(folder / "best", target.name)
        elif first:
            (folder / "best").unlink(missing_ok=True)
        _point(folder / "latest", target.name)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        shutil.rmtree(partial, ignore_errors=True)
        die(f"{target}: could not be written ({reason(error)}); the last good checkpoint is kept")
    pointers = {p.read_text() for p in (folder / "latest", folder / "best") if p.exists()}
    own = [] if first else [p.name for p in all_of(folder) if step_of(p) <= step]
    for old in (*folder.glob("step_*"), *folder.glob(".step_*.*")):
        if old.name not in {*own[: cfg.keep], *pointers}:
            shutil.rmtree(old, ignore_errors=True)


def _point(path, name):
    durable.write(path, lambda partial: partial.write_text(name))


def point_best(folder, step):
    """A run that resumes at an older checkpoint has that one's best."""
    if (folder / f"step_{step}").is_dir():
        _point(folder / "best", f"step_{step}")
    else:
        (folder / "best").unlink(missing_ok=True)


def step_of(path):
    return int(path.name.removeprefix("step_"))


def all_of(folder):
    """The checkpoints in a stage's folder, the newest first."""
    latest, found = find(folder, "latest"), folder.glob("step_*")
    older = sorted((p for p in found if p.name[5:].isdigit()), key=step_of, reverse=True)
    return list(dict.fromkeys([latest, *older])) if latest else []


def find(folder, prefer="best"):
    """The step folder that `folder` stands for: its best, else its latest, or itself."""
    folder = Path(folder)
    if (folder / "weights.pt").exists():
        return folder
    for pointer in dict.fromkeys((prefer, "latest")):
        if (folder / pointer).exists():
            name = (folder / pointer).read_text(errors="replace").strip()[:99]
            replaced = durable.replaced(folder / name)  # by a save that was killed half way
            return replaced if replaced.exists() and not (folder / name).exists() else folder / name
    return None


MADE_BY = {stage: f"train_{stage}.py" for stage in ("gpt", "sft", "rm", "ppo")}


def load(folder, stages, prefer="best"):
    """Read a checkpoint of one of the given stages; anything else exits 2 with the reason."""
    path = find(folder, prefer)
    if path is None:
        scripts = " or ".join(MADE_BY[stage] for stage in stages)
        die(f"{folder}: no checkpoint there; {scripts} makes one")
    damage = durable.damage(path, ("weights.pt", "tokenizer.json", "config.json"))
    if damage:
        die(f"{path}: not a whole checkpoint ({damage})")
    try:
        config = json.loads((path / "config.json").read_text())
        if config["stage"] not in stages:
            wanted = " or ".join(stages)
            die(f"{path}: a checkpoint of stage {config['stage']}; this needs {wanted}")
        weights = {name: w.float() for name, w in read_bin(path / "weights.pt").items()}
        tokenizer = Tokenizer.load(path / "tokenizer.json")
        model_config = checked(GPTConfig(**config["model"]))
        stage, step = config["stage"], int(config["step"])
    except Exception as error:  # a damaged file raises whatever it makes a reader stumble over
        die(f"{path}: not a whole checkpoint ({type(error).__name__}: {reason(error)})")
    if tokenizer.vocab_size != model_config.vocab_size:
        die(f"{path}: tokenizer of {tokenizer.vocab_size}, model of {model_config.vocab_size} ids")
    return Checkpoint(path, stage, step, weights, tokenizer, model_config, config)


def load_gpt(folder, stages=("gpt", "sft", "ppo"), dropout=0.0):
    """(GPT in float32, Checkpoint): of stages "rm" and "ppo" only the language model. Dropout is a
    stage's own choice and not handed on to the next."""
    checkpoint = load(folder, stages)
    checkpoint.model_config.dropout = dropout
    with torch.device("meta"):  # sizes of a damaged file might not fit into any memory
        gpt = GPT(checkpoint.model_config)
    restore(gpt, gpt_weights(checkpoint), checkpoint.path)
    checkpoint.weights = {}  # they would stay in memory for as long as the run
    return gpt, checkpoint


def gpt_weights(checkpoint):
    """The language model's weights; in stages "rm" and "ppo" it has a head beside it."""
    if checkpoint.stage in ("gpt", "sft"):
        return checkpoint.weights
    found = checkpoint.weights.items()
    return {k.removeprefix("gpt."): w for k, w in found if k.startswith("gpt.")}


def load_reward_model(folder):
    """(RewardModel in float32, Checkpoint)."""
    checkpoint = load(folder, ("rm",))
    with torch.device("meta"):
        model = RewardModel(GPT(checkpoint.model_config))
    restore(model, checkpoint.weights, checkpoint.path)
    checkpoint.weights = {}
    return model, checkpoint


def restore(model, weights, path):
    """Load weights; a checkpoint of other sizes exits 2."""
    check_sizes(model, weights, path)
    model.load_state_dict(weights, assign=True)


def check_sizes(model, weights, path):
    """A checkpoint of other sizes exits 2 and names the first tensor that differs."""
    have = {name: tuple(w.shape) for name, w in weights.items()}
    for name, w in model.state_dict().items():
        if have.pop(name, None) != tuple(w.shape):
            die(f"{path}: tensor {name} is missing or has another shape than {tuple(w.shape)}")
    if have:
        die(f"{path}: tensor {next(iter(have))} has no place in this model")


def same_vocabulary(a, b):
    """Two checkpoints that work together must have one vocabulary."""
    if a.tokenizer != b.tokenizer:
        die(f"{a.path} and {b.path} have different vocabularies: they are of different runs")
