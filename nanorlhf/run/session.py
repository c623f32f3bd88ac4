"""One run in one folder: when it saves, and how it resumes.

On a CPU a run that was interrupted and resumed ends bit for bit as one that was not. Batches and
all else that is drawn at random are functions of (seed, step), and what a step depends on besides
is in the checkpoint.
"""

import math
import random
import shlex
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from nanorlhf.config import Mistake, die, note, warn
from nanorlhf.machine import durable, process, ranks
from nanorlhf.model import GPT
from nanorlhf.run import checkpoint

FREE = {"out_dir", "resume", "check"}  # the flags that no number of a run depends on
DATA = ("data", "val_data", "ptx_data")  # those that name data files
MODELS = ("init", "sft", "reward")  # those that name a model: a folder, or path.py:function


def seed_all(seed):
    """Seed PyTorch, and Python and NumPy too: a user's reward function may draw from any."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def fingerprints(cfg, files=()):
    """{what: sha256} of what a run reads: the data files of its flags and further `files`, and the
    weights of its models. Left out are data sets and models by name (hf:..., gpt2), and the
    embedded world, which the seed decides."""
    names = [str(name) for flag in DATA for name in getattr(cfg, flag, [])]
    paths = {name: Path(name) for name in (*names, *map(str, files))}
    for flag, name in models_of(cfg):
        path = checkpoint.find(name) or Path(name.partition(":")[0])
        what = f"--{flag} {name}" if f"--{flag}" in paths else f"--{flag}"  # a second --reward
        paths[what] = path / "weights.pt" if path.is_dir() else path
        for pattern in ("*.safetensors", "*.bin"):  # in the layout of Hugging Face
            paths |= {f"--{flag} {file.name}": file for file in path.glob(pattern)}
    return {what: durable.digest(path) for what, path in paths.items() if path.is_file()}


def models_of(cfg):
    """(flag, name) of each model that a flag names, one or several."""
    values = {flag: getattr(cfg, flag, "") for flag in MODELS}
    lists = {flag: [x] if isinstance(x, str) else x for flag, x in values.items()}
    return [(flag, name) for flag, names in lists.items() for name in names if name]


def keep_apart(cfg):
    """Exits 2 where the run would read a model from the folder that it writes to, whose checkpoints
    its first save replaces."""
    for flag, name in models_of(cfg):
        step = checkpoint.find(name)
        if step and step.resolve().parent == Path(cfg.out_dir).resolve():
            die(f"--{flag} {name} is in --out_dir, where it would be overwritten")


class Run:
    """Steps start..max_steps of a stage in its folder; row s describes the model after s steps."""

    def __init__(self, stage, cfg, optimizer, tokenizer, n_steps, files=(), details=None):
        """`files`: what the run reads beside its flags' files and models, see `fingerprints`.
        `details`: what else its config.json says."""
        self.stage, self.cfg, self.optimizer, self.tokenizer = stage, cfg, optimizer, tokenizer
        self.folder, self.max_steps, self.start = Path(cfg.out_dir), n_steps, 0
        self.details = (details or {}) | {"fingerprints": fingerprints(cfg, files)}
        self.best = (math.inf, 0)  # (validation loss, step) of the best checkpoint
        process.listen()
        size = f"{sum(p.numel() for p in optimizer.model.parameters()) / 1e6:.2f}M parameters"
        n, device, dtype = process.world_size(), optimizer.device, str(optimizer.dtype)[6:]
        where = device if n == 1 else f"{n} x {device.type}"
        note(f"[{stage}] {size}, {where}, {dtype}, seed {cfg.seed}, {cfg.out_dir}")

    def resume(self):
        """With --resume, load the newest checkpoint. Returns (the step to start at, the dict saved
        with it); (0, {}) for a new run."""
        path = checkpoint.newest(self.folder) if self.cfg.resume else None
        if path is None:
            if self.cfg.resume:
                note(f"[{self.stage}] {self.folder}: no checkpoint to resume, starts at step 0")
            elif checkpoint.find(self.folder):
                note(f"[{self.stage}] {self.folder} holds an earlier run, until the first save")
            ranks.on_main(lambda: checkpoint.set_aside(self.folder))
            return 0, {}
        saved = checkpoint.load(path, as_saved=True)
        self._must_match(saved)
        try:
            state = durable.read_pickle(path / "state.pt")
            self.optimizer.load(saved.weights, state["optimizer"])
            self.best = tuple(state["best"])
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            checkpoint.die_of_damage(path, error)
        self.start = saved.step
        ranks.on_main(lambda: checkpoint.point(self.folder, "best", self.best[1]))
        note(f"[{self.stage}] resumed at step {self.start} from {path}")
        return self.start, state

    def _must_match(self, saved):
        """Exits 2 where the checkpoint is of other data, another model or another --mistake. Other
        flags may change."""
        if saved.stage != self.stage:
            die(f"{saved.path}: a checkpoint of stage {saved.stage}; this is stage {self.stage}")
        if saved.tokenizer != self.tokenizer:
            die(f"{saved.path}: made with another tokenizer; start anew without --resume")
        then, now = saved.config["fingerprints"], self.details["fingerprints"]
        if other := [what for what in now if then.get(what, now[what]) != now[what]]:
            message = f"{saved.path}: other contents than when this run began: {', '.join(other)}"
            die(f"{message}; put them back, or start anew without --resume")
        then, now = saved.config["flags"], vars(self.cfg)
        if (was := then.get("mistake", "")) != now["mistake"]:
            typed = " --seed ".join(was.split(":")[:2])  # a hunt is kept as hunt:SEED:DIGEST
            begun = f"with --mistake {typed}" if was else "without --mistake"
            die(f"{saved.path}: begun {begun}; resume it so")
        if changed := [name for name in now if name not in FREE and then.get(name) != now[name]]:
            phrases = [f"--{name} was {then.get(name)}, is {now[name]}" for name in changed]
            warn(f"goes on with other flags: {'; '.join(phrases)}")
        checkpoint.check_sizes(self.optimizer.model, saved.weights, saved.path)

    def due(self, step):
        """A step begins. Returns why to save before it: "planned" (every so many steps, and at the
        end), "signal" (one asks the run to end), or "" for no reason. What is drawn at random in
        the step depends on seed and step alone: so a checkpoint need not hold any random state."""
        seed_all(self.cfg.seed * 1_000_003 + step)
        is_signalled = any(ranks.of_all(process.heard()))
        if step == self.max_steps or step % self.cfg.save_every == 0 and step > self.start:
            return "planned"
        return "signal" if is_signalled else ""

    def save(self, step, why, state, loss=None):
        """Write a checkpoint, then end the program if a signal asked for that. `why` is what `due`
        said, `state` what the stage needs to go on, `loss` the validation loss.

        A planned checkpoint becomes the best if no earlier one has a lower loss. One that was saved
        because of a signal never does: an undisturbed run would not have it.
        """
        if loss is not None and why == "planned" and loss <= self.best[0]:
            self.best = (loss, step)
        state |= {"optimizer": self.optimizer.state(), "best": self.best}
        model = self.optimizer.model
        model_config = (model if isinstance(model, GPT) else model.gpt).config
        contents = self.optimizer.weights(), state, self.tokenizer, model_config
        checkpoint.save(self.cfg, self.stage, step, *contents, self.best[1], self.details)
        if step < self.max_steps and any(ranks.of_all(process.heard())):
            self._end(step)

    @contextmanager
    def saving(self, step, state):
        """Where a mistake in here ends the program, such as a judge that fails, the steps before it
        are saved first. (One rank of several cannot do that: the others know nothing of it.)"""
        try:
            yield
        except Mistake:
            if process.world_size() == 1 and step > self.start:
                self.save(step, "signal", state)
            raise

    def _end(self, step):
        n, words = process.world_size(), shlex.join(a for a in sys.argv if a != "--resume")
        python = "python" if n == 1 else f"torchrun --nproc_per_node={n}"
        ended = f"\n[{self.stage}] ended at step {step} of {self.max_steps}, saved; this goes on:"
        note(f"{ended}\n  {python} {words} --resume")
        ranks.leave()  # once rank 0 has saved: when one rank has gone, torchrun ends the others
        raise SystemExit(128 + (process.heard() or signal.SIGTERM))


def stop_if_not_finite(step, x, sources):
    """Exit 2 where x, a loss or a gradient's norm, is inf or nan, and name some of the batch's
    sources. The optimizer has not changed the weights then."""
    if not math.isfinite(x):
        some = ", ".join(list(dict.fromkeys(sources))[:4])
        die(f"loss is not finite at step {step}, batch of {some}; the last checkpoint is kept")
