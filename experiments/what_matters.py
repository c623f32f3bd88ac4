"""Claim: a few of PPO's many details carry its result (arXiv:2403.17031 lists 25 of them).

    python -m experiments.what_matters              # 8 seeds, about 4 hours of one core
    python -m experiments.what_matters --quick

One detail at a time is switched off or swapped; each run has the same SFT model, reward model and
seed as the run with all of them. Reported: the change in gold of the last policy on 512 held-out
prompts, mean and 95 % interval over seeds, with KL and length.
"""

from dataclasses import dataclass
from functools import partial

import train_ppo
from experiments.lab import Lab, LabConfig, curve_of, interval, models_of, numbers, ppo_of
from nanorlhf import functional as f
from nanorlhf import picture
from nanorlhf.config import arg, from_cli


def unwhitened(cfg, rollout, scores, kl_coef):
    estimates = train_ppo.ppo_advantages(cfg, rollout, scores, kl_coef)
    raw = estimates["returns"] - rollout.get("values", 0)
    del estimates["advantage_scale"]  # they are divided by nothing
    return estimates | {"advantages": raw.masked_fill(~rollout["response_mask"], 0)}


def with_k3(cfg, rollout, scores, kl_coef):
    """k3 in place of k1 in the reward, whose gradient is not the KL's (docs/details.md)."""
    k3 = f.kl_estimate(rollout["logprobs"], rollout["ref_logprobs"], "k3")
    swapped = rollout | {"logprobs": rollout["ref_logprobs"] + k3}  # so that their k1 is this k3
    return train_ppo.ppo_advantages(cfg, swapped, scores, kl_coef)


def scaled(factor, cfg, rollout, scores, kl_coef):
    return train_ppo.ppo_advantages(cfg, rollout, factor * scores, kl_coef)


PLAIN = train_ppo.ppo_advantages
DETAILS = {  # what is changed -> (flags, estimate)
    "nothing": ({}, PLAIN),
    "no KL penalty": ({"kl_coef": 0.0}, PLAIN),
    "adaptive KL": ({"kl_target": 6.0}, PLAIN),
    "k3 as reward": ({}, with_k3),
    "no value clip": ({"cliprange_value": 1e6}, PLAIN),
    "no policy clip": ({"cliprange": 1e6}, PLAIN),
    "no whitening": ({}, unwhitened),
    "cut responses judged as they are": ({"score_unended": True}, PLAIN),
    "scores times 3": ({}, partial(scaled, 3.0)),
    "scores by 3": ({}, partial(scaled, 1 / 3)),
    "lambda 1": ({"lam": 1.0}, PLAIN),
    "separate critic": ({"critic": "separate"}, PLAIN),
    "no critic": ({"critic": "none"}, PLAIN),
    "half the blocks frozen": ({"freeze_layers": 1}, PLAIN),
    "1 epoch": ({"ppo_epochs": 1}, PLAIN),
    "4 epochs": ({"ppo_epochs": 4}, PLAIN),
    "PPO-ptx": ({"ptx_coef": 0.5}, PLAIN),
}


@dataclass
class Config(LabConfig):
    """The change in gold when one detail of PPO is left out or swapped."""

    QUICK = {"seeds": [1], "steps": 1}
    seeds: list[int] = arg([1, 2, 3, 4, 5, 6, 7, 8], "each a world's models of its own")
    steps: int = arg(24, "iterations of PPO")


def main(cfg):
    lab = Lab(cfg, "what_matters", "seed changed step kl proxy gold", "steps")
    keys = [{"seed": seed, "changed": name} for name in DETAILS for seed in cfg.seeds]
    draw(cfg, lab, lab.each(ppo, keys))


def ppo(lab, seed, changed):
    (_, sft, reward), (flags, estimate) = models_of(lab.cfg, seed), DETAILS[changed]
    to = f"{lab.folder}/ppo_{seed}_{changed.replace(' ', '_')}"
    flags = flags | {"eval_every": lab.cfg.steps, "eval_prompts": 32 if lab.cfg.quick else 512}
    return curve_of(ppo_of(lab.cfg, to, seed, sft, reward, estimate, **flags))[-1:]


def draw(cfg, lab, rows):
    """A bar for each detail, and the same as a table."""
    of = lambda name, column: numbers(rows, column, changed=name)
    figure, ax = picture.pyplot().subplots(figsize=(8, 0.32 * len(DETAILS) + 1))
    for name in DETAILS:
        kl, change = of(name, "kl").mean(), interval(of(name, "gold") - of("nothing", "gold"))
        print(f"{name:34} gold {change:+.3f}, KL {kl:.1f}")
        if name != "nothing":
            mean, half = change
            ax.barh(f"{name}  (KL {kl:.1f})", mean, xerr=half, color=picture.GREY, capsize=3)
    ax.invert_yaxis()
    ax.axvline(0, color="black", lw=0.8)
    ax.set_xlabel("change in gold utility, mean and 95 % interval")
    usual_kl = of("nothing", "kl").mean()
    lab.save(figure, f"one detail of PPO changed; KL unchanged: {usual_kl:.1f}; means")


if __name__ == "__main__":
    main(from_cli(Config))
