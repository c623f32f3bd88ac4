"""One run in one folder: its checkpoints, and resuming.

A resumed run is the uninterrupted one, bit for bit on a CPU: batches and sampling noise are
functions of (seed, step), and everything else that a step depends on is in the checkpoint.
"""

import math
import random
import shlex
import signal
import sys
from pathlib import Path

import numpy as np
import torch

from nanorlhf import config
from nanorlhf.config import die, rank, warn, world_size
from nanorlhf.hf.folder import read_pickle
from nanorlhf.machine import durable, process, ranks
from nanorlhf.model import GPT
from nanorlhf.run import checkpoint

# flags of which no number depends
FREE = {"out_dir", "resume", "resume_anyway", "keep", "check", "tensorboard"}


# ---- what a run depends on ---------------------------------------------------------------------


def seed_all(seed):
    """Python's and NumPy's generators too: a user's own reward function may draw from them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_states():
    """Of all generators, to be saved."""
    kind, keys, *more = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *more],
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def restore_random(states):
    random.setstate(states["python"])
    kind, keys, *more = states["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *more))
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def fingerprints(cfg, data=(), models=()):
    """{what: sha256} of what a run reads: the files of its data flags and `data`, and the weights
    of `models`, names of flags that hold checkpoint folders or path.py:function. What hf: names
    stand for is not looked at, nor is the world, which is a function of the seed."""
    flags = (getattr(cfg, name, []) for name in ("data", "val_data", "ptx_data"))
    files = {str(path) for path in (*data, *(f for files in flags for f in files))}
    found = {path: path for path in sorted(files) if Path(path).is_file()}
    for flag, spec in ((f"--{name}", getattr(cfg, name)) for name in models):
        folder = checkpoint.find(spec)
        if ".py:" in spec:
            found[flag] = spec.rpartition(":")[0]
        elif folder:
            found[flag] = folder / "weights.pt"
        elif Path(spec).is_dir():  # Hugging Face's layout
            weights = sorted(
                p for p in Path(spec).iterdir() if p.suffix in (".safetensors", ".bin")
            )
            found |= {f"{flag} {p.name}": p for p in weights}
    return {what: durable.digest(path) for what, path in found.items()}


def differences(cfg, prints, saved):
    """(what has other contents, what flags have other values) than in a checkpoint's config."""
    was = saved.get("fingerprints", {})
    contents = [what for what, x in prints.items() if was.get(what, x) != x]
    flags = {k: v for k, v in saved["flags"].items() if hasattr(cfg, k) and k not in FREE}
    now = {k: getattr(cfg, k) for k in flags}
    return contents, [f"--{k} was {v}, is {now[k]}" for k, v in flags.items() if v != now[k]]


# ---- a run -------------------------------------------------------------------------------------


class Run:
    """Steps start..max_steps of a stage in its folder; row s describes the model after s steps."""

    def __init__(self, stage, cfg, optimizer, tokenizer, max_steps, files=(), models=(), chat=True):
        """files and models: what the run reads, see `fingerprints`. chat: the model learns the
        chat template."""
        self.stage, self.cfg, self.optimizer, self.tokenizer = stage, cfg, optimizer, tokenizer
        self.chat = chat
        self.prints = fingerprints(cfg, files, models)
        self.folder, self.max_steps, self.best = Path(cfg.out_dir), max_steps, (math.inf, 0)
        self.begun = self.folder / ".begun"  # a new run that has no checkpoint yet
        process.listen()
        size = f"{sum(p.numel() for p in optimizer.model.parameters()) / 1e6:.2f}M parameters"
        n, device = world_size(), optimizer.device
        where = device if n == 1 else f"{n} x {device.type}"
        about = f"{size}, {where}, {str(optimizer.dtype)[6:]}, seed {cfg.seed}, {cfg.out_dir}"
        print(f"[{stage}] {about}")

    def resume(self):
        """Load the newest whole checkpoint, if this is a run to resume; returns (step, state)."""
        path = newest(self.cfg) if self.cfg.resume else None
        self.start, self.saved = 0, path is not None
        if path is None:
            if self.cfg.resume:
                print(f"[{self.stage}] {self.folder}: no checkpoint to resume, starts at step 0")
            elif checkpoint.find(self.folder):
                print(
                    f"[{self.stage}] {self.folder} holds an earlier run, replaced when this one "
                    "first saves"
                )
            try:
                ranks.on_main(self.begun.touch)
            except OSError as error:
                die(f"{self.begun}: {error.strerror}")
            return 0, {}
        found = checkpoint.load(path)
        self._must_match(found)
        state = read_pickle(path / "state.pt")
        try:
            self.optimizer.load(found.weights, state["optimizer"])
            restore_random(state["random"])
            self.best = tuple(state["best"])
        except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
            die(f"{path}: cannot be resumed ({type(error).__name__}: {config.reason(error)})")
        self.start = found.step
        if rank() == 0:
            checkpoint.point_best(self.folder, self.best[1])
        print(f"[{self.stage}] resumed at step {self.start} from {path}")
        return self.start, state

    def _must_match(self, found):
        if found.stage != self.stage:
            die(f"{found.path}: a checkpoint of stage {found.stage}; this is stage {self.stage}")
        if found.tokenizer != self.tokenizer:
            die(f"{found.path}: made with another tokenizer; start anew without --resume")
        contents, flags = differences(self.cfg, self.prints, found.config)
        if contents:
            die(
                f"{found.path}: other contents than when this run began: {', '.join(contents)}; "
                "put them back, or start anew without --resume"
            )
        if flags and not self.cfg.resume_anyway:
            die(f"{found.path}: {'; '.join(flags)}; --resume_anyway goes on so")
        if flags:
            warn(f"goes on with other flags: {'; '.join(flags)}")
        if found.config["commit"] != process.commit():
            warn(f"{found.path} is of commit {found.config['commit']}: another program than this")
        checkpoint.check_sizes(self.optimizer.model, found.weights, found.path)

    def due(self, step):
        """Why to save before this step: "planned" (regularly, and at the end), "signal" where one
        came, or "" where there is no reason."""
        planned = step == self.max_steps or step % self.cfg.save_every == 0 and step > self.start
        asked = ranks.on_any(process.heard() is not None)
        return "planned" if planned else "signal" if asked else ""

    def save(self, step, why, state, loss=None):
        """Write a checkpoint, the best one if no earlier one has a smaller validation loss; where
        a signal came, end the program. Steps that only a signal saves can not be the best: the
        run that was left alone would not have saved them."""
        if not self.folder.is_dir():
            die(f"{self.folder}: the folder is gone")
        is_best = loss is not None and why == "planned" and loss <= self.best[0]
        self.best = (loss, step) if is_best else self.best
        state |= {"optimizer": self.optimizer.state(), "best": self.best, "random": random_states()}
        model = self.optimizer.model
        model_config = (model if isinstance(model, GPT) else model.gpt).config
        checkpoint.save(
            self.cfg,
            self.stage,
            step,
            self.optimizer.weights(),
            state,
            self.tokenizer,
            model_config,
            first=not self.saved,
            best=is_best,
            prints=self.prints,
            chat=self.chat,
        )
        self.saved = True
        if rank() == 0:
            self.begun.unlink(missing_ok=True)
        if step == self.max_steps:
            process.deafen()
        elif ranks.on_any(process.heard() is not None):
            self._end(step)

    def _end(self, step):
        n = world_size()
        python = "python" if n == 1 else f"torchrun --nproc_per_node={n}"
        again = shlex.join(a for a in sys.argv if a != "--resume")
        print(
            f"\n[{self.stage}] ended at step {step} of {self.max_steps}, saved; this goes on:\n"
            f"  {python} {again} --resume"
        )
        ranks.on_main(lambda: None)  # it has saved; torchrun ends it when the first is gone
        ranks.leave()
        raise SystemExit(128 + (process.heard() or signal.SIGTERM))


def newest(cfg):
    """The newest whole checkpoint of the run in cfg.out_dir, or None; damaged ones are named."""
    folder = Path(cfg.out_dir)
    if (folder / ".begun").exists():
        return None  # it is an earlier run's
    for path in (found := checkpoint.all_of(folder)):
        damage = durable.damage(path, ("weights.pt", "state.pt", "config.json", "tokenizer.json"))
        if not damage:
            return path
        warn(f"{path}: {damage}")
    if found:
        die(f"{folder}: no whole checkpoint is left; start anew without --resume")
    return None


def stop_if_not_finite(step, x, sources):
    """A loss or gradient that is inf or nan: nothing was updated, say where it came from."""
    if not math.isfinite(x):
        shown = ", ".join(list(dict.fromkeys(sources))[:4])
        die(
            f"loss is not finite at step {step}, batch of {shown}, ...; the last checkpoint is kept"
        )
