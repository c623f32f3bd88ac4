"""Famous mistakes to switch on: `--mistake NAME` puts one into a run, which shows what it does.

    python train_ppo.py --mistake list
    python train_ppo.py --mistake k3_swapped --out_dir out/k3
    python train_ppo.py --mistake hunt --seed 7 --out_dir out/hunt      # which one is not said
    python train_ppo.py --mistake reveal --out_dir out/hunt             # until it is asked for

A mistake replaces a function, as an edit of it would. The run goes without --check, which would
catch most of them. config.json keeps the name; whatever loads the model says so.

A mistake is a function that puts it in. Its docstring says of which stage it is, what is wrong, and
what would have caught it.
"""

import hashlib
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from nanorlhf import engine, functional, model, rollout, sampling
from nanorlhf.config import die, note
from nanorlhf.data import dialogue
from nanorlhf.model import ActorCritic, RewardModel
from nanorlhf.picture import healthy
from nanorlhf.run import checkpoint
from nanorlhf.run.doctor import Doctor
from nanorlhf.run.metrics import read_rows

SHOWN = """val_loss val_accuracy eval_gold eval_scores eval_kl_exact kl kl_k3 explained_variance
eval_length eval_eos_rate"""
PATCH = SimpleNamespace(setattr=setattr)  # for good: a broken run is a process of its own
BROKEN = []  # --out_dir and --mistake of the run that was broken last

# ---- the mistakes -------------------------------------------------------------------------------


def everywhere(patch, old, new):
    """Replace a function under every name that it was imported by, in a script that runs too."""
    for module in list(sys.modules.values()):
        for name in [k for k, x in list(vars(module).items()) if x is old]:
            patch.setattr(module, name, new)


def future_seen(patch):
    """gpt: attention sees the future. `--check` would say: padding."""
    good = model.attention
    see_all = lambda q, k: q.new_zeros(q.shape[2], k.shape[2])
    bad = lambda q, k, v, bias, p: good(q, k, v, see_all(q, k) if bias is None else bias, p)
    everywhere(patch, good, bad)


def change_loss_flags(patch, change):
    """Of (whether an id carries loss, whether it ends a text) makes another flag."""
    good = dialogue.encode_demonstrations

    def bad(tokenizer, *rest):
        rows, ends = good(tokenizer, *rest), tokenizer.ends
        flags = lambda ids, is_loss: [change(x, i in ends) for i, x in zip(ids, is_loss)]
        return [(ids, flags(ids, is_loss), source) for ids, is_loss, source in rows]

    everywhere(patch, good, bad)


def eos_unlearned(patch):
    """sft: the eos of a demonstration carries no loss. `--check` would say: eos."""
    change_loss_flags(patch, lambda is_loss, is_end: is_loss and not is_end)


def prompts_in_the_loss(patch):
    """sft: prompts carry loss too. `--check` would say: mask."""
    change_loss_flags(patch, lambda is_loss, is_end: True)


def labels_swapped(patch):
    """rm: the loss prefers the worse answer. Only the metric val_accuracy says so."""
    for good in (functional.ranking_loss, functional.rating_loss, functional.thumbs_loss):
        everywhere(patch, good, lambda scores, judged, good=good: good(-scores, judged))


def before_the_eos(patch):
    """rm: the score is read one token before the eos. `--check` would say: mask."""
    read = lambda net, tokens, mask: net(tokens).gather(1, mask.sum(1, keepdim=True) - 2)[:, 0]
    patch.setattr(RewardModel, "score", read)


def eos_masked(patch):
    """ppo: the action of stopping is in no loss. `--check` would say: eos."""
    good, is_end = sampling.response_mask, sampling.is_end
    bad = lambda responses, ends: good(responses, ends) & ~is_end(responses, ends)
    patch.setattr(rollout, "response_mask", bad)


def cold_samples(patch):
    """ppo: samples are of temperature 0.8, log-probs of 1. `--check` would say: sampling."""
    bad = lambda *args: sampling.generate(*args[:-1], 0.8 * args[-1])
    patch.setattr(rollout, "generate", bad)


def score_everywhere(patch):
    """ppo: the score is added to every token. `--check` would say: rewards."""
    bad = lambda scores, kl, mask, c: (scores[:, None] - c * kl).masked_fill(~mask, 0)
    patch.setattr(functional, "shaped_rewards", bad)


def k3_in_the_reward(patch):
    """ppo: k3, and not k1, is in the reward. A test of its gradient would say so."""
    good = functional.shaped_rewards
    bad = lambda scores, kl, mask, c: good(scores, torch.expm1(-kl) + kl, mask, c)
    patch.setattr(functional, "shaped_rewards", bad)


def k3_swapped(patch):
    """ppo: k3 has its arguments swapped. The metric kl_exact beside kl_k3 says so."""
    good = functional.kl_estimate
    bad = lambda p, q, kind: good(q, p, kind) if kind == "k3" else good(p, q, kind)
    patch.setattr(functional, "kl_estimate", bad)


def reference_moves(patch):
    """ppo: the reference is the policy itself. `--check` would say: reference."""
    everywhere(patch, model.frozen_reference, lambda gpt: gpt)


def late_values(patch):
    """ppo: a value has read the token that it is for. A test of `ActorCritic` would say so."""
    good = ActorCritic.forward
    late = lambda policy, rows: good(policy, rows | {"states": rows["states"] + 1})[1]
    patch.setattr(ActorCritic, "forward", lambda *args: (good(*args)[0], late(*args)))


OF_STAGE = {
    "gpt": [future_seen],
    "sft": [eos_unlearned, prompts_in_the_loss],
    "rm": [labels_swapped, before_the_eos],
    "ppo": [eos_masked, cold_samples, score_everywhere, k3_in_the_reward, k3_swapped]
    + [reference_moves, late_values],
}
MISTAKES = {m.__name__: m for mistakes in OF_STAGE.values() for m in mistakes}
IDLE = (  # flags, and mistakes that change no number beside them
    ({"critic": "none"}, [late_values]),
    ({"critic": "shared", "vf_coef": 0}, [late_values]),  # its values stay 0
    ({"baseline": "grpo"}, [k3_in_the_reward]),  # experiments/train_rloo.py: no KL in the reward
    ({"kl_coef": 0}, [k3_in_the_reward]),
    ({"shard": True}, [reference_moves]),  # the reference is a copy before it gets there
    ({"max_new_tokens": 1}, [score_everywhere]),
    ({"max_steps": 1}, [k3_in_the_reward, k3_swapped]),  # in the first rollout every k is 0
    ({"learning_rate": 0}, [k3_in_the_reward, k3_swapped, reference_moves]),
)


# ---- a run with a mistake -----------------------------------------------------------------------


def stage_of(cfg):
    """Whose Config it is: gpt, sft, rm or ppo, also of a fork of theirs; "" for another."""
    files = [Path(sys.modules[c.__module__].__file__).stem for c in type(cfg).__mro__[:-1]]
    stages = {f"train_{stage}": stage for stage in OF_STAGE}
    return next((stages[file] for file in files if file in stages), "")


def encoded(name, seed):
    """A name that cannot be read, but compared."""
    return f"hunt:{seed}:" + hashlib.sha256(f"{seed} {name}".encode()).hexdigest()[:12]


def idle(cfg, name):
    """Where a run has flags beside which a mistake changes nothing, these flags, in words."""
    for flags, some in IDLE:
        if MISTAKES[name] in some and all(getattr(cfg, f, None) == x for f, x in flags.items()):
            return " and ".join(f"--{flag} is {x}" for flag, x in flags.items())


def make(cfg):
    """Do what --mistake says: break the run that begins, or list or reveal, and end. Nothing where
    a fork, such as experiments/train_rft.py, has begun the run, and now its stage would."""
    if BROKEN == [cfg.out_dir, cfg.mistake] and not cfg.check:
        return
    name, stage = cfg.mistake, stage_of(cfg)
    names = [mistake.__name__ for mistake in OF_STAGE.get(stage, [])]
    acting = [name for name in names if not idle(cfg, name)]
    if name in ("list", "reveal"):
        every = "\n".join(f"{name:20} {m.__doc__}" for name, m in MISTAKES.items())
        note(every if name == "list" else revealed(cfg))
        raise SystemExit(0)
    if name == "hunt" and names:
        drawn = random.Random(f"{cfg.seed} {stage}").sample(names, len(names))
        name = next(name for name in drawn if name in acting)
        cfg.mistake = encoded(name, cfg.seed)
        words = f"one of {', '.join(acting)}; --mistake reveal says which"
        words = words if acting[1:] else f"{name}, the only one of this stage"
    elif name in acting:
        words = f"{name}, {MISTAKES[name].__doc__}"
    elif name in names:
        die(f"--mistake {name} does nothing where {idle(cfg, name)}")
    elif names:
        die(f"--mistake {name}: this stage has {', '.join(['list', 'reveal', 'hunt', *names])}")
    else:
        die(f"--mistake {name}: this script has none to switch on")
    note(f"[{stage}] broken on purpose, and not checked: {words}")
    cfg.check = False
    BROKEN[:] = cfg.out_dir, cfg.mistake
    MISTAKES[name](PATCH)
    leave = engine.leave
    everywhere(PATCH, leave, lambda: (report(cfg, stage), leave()))


def revealed(cfg):
    """What the newest run in --out_dir was broken by."""
    path = checkpoint.find(cfg.out_dir, "latest")
    kept = json.loads((path / "config.json").read_text())["flags"].get("mistake") if path else ""
    seed = (kept or "").partition(":")[2].partition(":")[0]
    for name, mistake in MISTAKES.items():
        if kept in (name, encoded(name, seed)):
            return f"{path}: {name}, {mistake.__doc__}"
    return die(f"{cfg.out_dir}: no checkpoint of a run with a --mistake")


def report(cfg, stage):
    """What became of the run: its first and last numbers, what the doctor says, a healthy run's."""
    _, cells = read_rows(Path(cfg.out_dir, "metrics.csv"))
    rows = [{name: float(x) for name, x in row.items()} for row in cells]
    band = healthy([cfg.out_dir])
    note(f"[{stage}] --mistake {cfg.mistake}, first and last numbers:")
    for name in SHOWN.split():
        if values := [row[name] for row in rows if name in row]:
            line = f"  {name:18} {values[0]:9.3f} -> {values[-1]:9.3f}"
            if name in band:
                step, low, high = (column[-1] for column in band[name])
                line += f"   healthy runs at step {step}: {low:.3f} to {high:.3f}"
            note(line)
    doctor = Doctor(vars(cfg), cfg.max_steps or int(rows[-1]["step"]))
    findings = [str(finding) for row in rows for finding in doctor.read(row)]
    note("  the doctor: " + ("\n  ".join(findings) or "nothing to report"))
