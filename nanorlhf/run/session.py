"""One run in one folder: when it saves, and how it resumes.

On a CPU a run that was interrupted and resumed ends bit for bit as one that was not. Batches and
sampling noise are functions of (seed, step), and all else that a step depends on is in the
checkpoint.
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

from nanorlhf import config
from nanorlhf.config import die, rank, warn, world_size
from nanorlhf.hf.folder import read_pickle
from nanorlhf.machine import durable, process, ranks
from nanorlhf.model import GPT
from nanorlhf.run import checkpoint

# the flags that no number of a run depends on: a resumed run may have other values
FREE = {"out_dir", "resume", "resume_anyway", "keep", "check", "tensorboard"}


# ---- what a run depends on ---------------------------------------------------------------------


def seed_all(seed):
    """Seed PyTorch, and Python and NumPy too: a user's reward function may draw from these."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_states():
    """The states of all random generators, in types that a checkpoint may hold."""
    kind, keys, *more = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *more],
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def restore_random(states):
    """Go back to `random_states`; CUDA's only on a machine with as many GPUs."""
    random.setstate(states["python"])
    kind, keys, *more = states["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *more))
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def fingerprints(cfg, data=(), models=()):
    """{what: sha256} of what a run reads: its data files and the weights of its models.

    `data` names files beside those of the data flags. `models` names the flags that hold a
    checkpoint folder, a folder in Hugging Face's layout, or path.py:function. Left out are data
    sets by name (hf:...), and the embedded world, which the seed decides.
    """
    files = {str(path) for path in data}
    for flag in ("data", "val_data", "ptx_data"):
        files |= {str(path) for path in getattr(cfg, flag, [])}
    path_of = {path: path for path in sorted(files) if Path(path).is_file()}
    for flag in models:
        spec = getattr(cfg, flag)
        folder = checkpoint.find(spec)
        if ".py:" in spec:
            path_of[f"--{flag}"] = spec.rpartition(":")[0]
        elif folder:
            path_of[f"--{flag}"] = folder / "weights.pt"
        elif Path(spec).is_dir():
            for path in sorted(Path(spec).iterdir()):
                if path.suffix in (".safetensors", ".bin"):
                    path_of[f"--{flag} {path.name}"] = path
    return {what: durable.digest(path) for what, path in path_of.items()}


def differences(cfg, now, saved):
    """What is not as in a checkpoint's config.json, `saved`: (names of the files whose fingerprint
    differs from `now`, a phrase for each flag that has another value)."""
    then = saved.get("fingerprints", {})
    contents = [what for what, sha256 in now.items() if then.get(what, sha256) != sha256]
    flags = []
    for name, was in saved["flags"].items():
        if hasattr(cfg, name) and name not in FREE and getattr(cfg, name) != was:
            flags.append(f"--{name} was {was}, is {getattr(cfg, name)}")
    return contents, flags


def keep_apart(cfg):
    """Exits 2 where the run would read a model from the folder that it writes to, whose checkpoints
    its first save replaces."""
    out_dir = Path(cfg.out_dir).resolve()
    for flag in ("init", "sft", "reward"):
        named = getattr(cfg, flag, "") or "nowhere"
        folder = Path(named).resolve()
        is_step = (folder / "weights.pt").exists() and folder.parent == out_dir
        if is_step or folder == out_dir:
            die(f"--{flag} {named} is in --out_dir, where it would be overwritten")


# ---- a run -------------------------------------------------------------------------------------


class Run:
    """Steps start..max_steps of a stage in its folder; row s describes the model after s steps."""

    def __init__(
        self,
        stage,
        cfg,
        optimizer,
        tokenizer,
        max_steps,
        files=(),
        models=(),
        chat=True,
        about=None,
    ):
        """`files` and `models`: what the run reads, see `fingerprints`. `chat`: whether the model
        learns the chat template. `about`: what else its config.json says."""
        self.stage, self.cfg, self.optimizer, self.tokenizer = stage, cfg, optimizer, tokenizer
        self.folder, self.max_steps = Path(cfg.out_dir), max_steps
        self.fingerprints = fingerprints(cfg, files, models)
        self.about = {"chat": chat, "fingerprints": self.fingerprints} | (about or {})
        self.best = (math.inf, 0)  # (validation loss, step) of the best checkpoint
        self.begun = self.folder / ".begun"  # there while a new run has no checkpoint of its own
        process.listen()
        size = f"{sum(p.numel() for p in optimizer.model.parameters()) / 1e6:.2f}M parameters"
        n, device = world_size(), optimizer.device
        where = device if n == 1 else f"{n} x {device.type}"
        about = f"{size}, {where}, {str(optimizer.dtype)[6:]}, seed {cfg.seed}, {cfg.out_dir}"
        print(f"[{stage}] {about}")

    def resume(self):
        """With --resume, load the newest whole checkpoint. Returns (the step to start at, the dict
        saved with it); (0, {}) for a new run."""
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
        contents, flags = differences(self.cfg, self.fingerprints, found.config)
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
        """Why to save before this step: "planned" (every so many steps, and at the end), "signal"
        (one asks the run to end), or "" for no reason."""
        asked = ranks.on_any(process.heard() is not None)
        if step == self.max_steps or step % self.cfg.save_every == 0 and step > self.start:
            return "planned"
        return "signal" if asked else ""

    def save(self, step, why, state, loss=None):
        """Write a checkpoint, then end the program if a signal asked for that. `why` is what `due`
        said, `state` what the stage needs to go on, `loss` the validation loss.

        The checkpoint becomes the best where no earlier one has a smaller loss. One that only a
        signal caused cannot: an uninterrupted run would not have saved it.
        """
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
            about=self.about,
        )
        self.saved = True
        if rank() == 0:
            self.begun.unlink(missing_ok=True)
        if step == self.max_steps:
            process.deafen()
        elif ranks.on_any(process.heard() is not None):
            self._end(step)

    @contextmanager
    def saving(self, step, state):
        """Where a mistake in here ends the program, such as a judge that fails, the steps before it
        are saved first. (One rank of several cannot do that: the others know nothing of it.)"""
        try:
            yield
        except config.Mistake:
            if world_size() == 1 and step > self.start:
                self.save(step, "signal", state)
            raise

    def _end(self, step):
        n = world_size()
        python = "python" if n == 1 else f"torchrun --nproc_per_node={n}"
        again = shlex.join(a for a in sys.argv if a != "--resume")
        print(
            f"\n[{self.stage}] ended at step {step} of {self.max_steps}, saved; this goes on:\n"
            f"  {python} {again} --resume"
        )
        # wait until rank 0 has saved: once one rank has gone, torchrun ends the others
        ranks.on_main(lambda: None)
        ranks.leave()
        raise SystemExit(128 + (process.heard() or signal.SIGTERM))


def newest(cfg):
    """The newest whole checkpoint of the run in cfg.out_dir, or None where it has none yet. Warns
    of damaged ones; exits 2 where all are."""
    folder = Path(cfg.out_dir)
    if (folder / ".begun").exists():
        return None  # the run has saved nothing: checkpoints here are an earlier run's
    paths = checkpoint.all_of(folder)
    for path in paths:
        damage = durable.damage(path, ("weights.pt", "state.pt", "config.json", "tokenizer.json"))
        if not damage:
            return path
        warn(f"{path}: {damage}")
    if paths:
        die(f"{folder}: no whole checkpoint is left; start anew without --resume")
    return None


def stop_if_not_finite(step, x, sources):
    """Exit 2 where x, a loss or a gradient's norm, is inf or nan, and name some of the batch's
    sources. The optimizer has not changed the weights then."""
    if not math.isfinite(x):
        shown = ", ".join(list(dict.fromkeys(sources))[:4])
        die(
            f"loss is not finite at step {step}, batch of {shown}, ...; the last checkpoint is kept"
        )
