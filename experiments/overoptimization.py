"""Claim: as a policy moves away from the model that its reward model has seen, the score rises on
and true quality falls; more feedback puts that off (arXiv:2210.10760, figure 1).

    python -m experiments.overoptimization              # 3 seeds, about 3 hours of one core
    python -m experiments.overoptimization --quick

Distance is d = sqrt(KL), KL in nats from the SFT model. Gold and score are centred at d = 0. PPO
runs with several --kl_coef; best-of-n has KL = log n - (n - 1) / n. The paper's forms are fitted to
gold: d (a - b d) for best-of-n, and d (a - b log d) for PPO without a penalty.
"""

from dataclasses import dataclass

import numpy as np

from experiments.lab import Lab, LabConfig, best_of_n, curve_of, numbers, ppo_of, rm_of, sft_of
from nanorlhf import picture
from nanorlhf.config import arg, from_cli
from nanorlhf.data import world


@dataclass
class Config(LabConfig):
    """Gold and proxy against the distance from SFT, for several amounts of feedback."""

    QUICK = {"seeds": [1], "feedback": [40, 80], "kl_coefs": [0.0], "steps": 4, "samples": 16}
    feedback: list[int] = arg([60, 200, 600], "prompts whose responses are ranked")
    kl_coefs: list[float] = arg([0.0, 0.02, 0.05, 0.1, 0.2], "of PPO")
    steps: int = arg(60, "iterations of PPO")
    samples: int = arg(256, "responses to a prompt, of which the best of n is taken")


def main(cfg):
    lab = Lab(cfg, "overoptimization", "seed feedback by step kl proxy gold", "steps samples")
    by = ["best of n", *(f"kl_coef {coef}" for coef in cfg.kl_coefs)]
    arms = [(b, n) for b in by for n in cfg.feedback]
    keys = [{"by": b, "feedback": n, "seed": s} for b, n in arms for s in cfg.seeds]
    draw(cfg, lab, lab.each(measured, keys))


def measured(lab, by, feedback, seed):
    """The curve of best of n or of a run of PPO."""
    cfg, sft, to = lab.cfg, sft_of(lab.cfg, seed)[1], f"{lab.folder}/rm_{seed}_{feedback}"
    reward = rm_of(cfg, to, seed, init=sft, prompts=feedback)
    if by == "best of n":
        parts = {"train": 3, "held_out": 1} if cfg.quick else {"train": 90, "held_out": 10}
        prompts = [p for part, n in parts.items() for p in world.prompts(part, n, f"sample/{seed}")]
        return best_of_n(sft, reward, prompts, cfg.samples, seed)
    coef = by.split()[1]
    flags = {"kl_coef": float(coef), "eval_every": max(1, cfg.steps // 15)}
    flags |= {"eval_prompts": 16 if cfg.quick else 256}
    to = f"{lab.folder}/ppo_{coef}_{seed}_{feedback}"
    return curve_of(ppo_of(cfg, to, seed, sft, reward, **flags))


def fitted(d, y, is_rl):
    """(a, b, R^2) of y = d (a - b d), or for RL d (a - b log d), by least squares."""
    d, y = d[d > 0], y[d > 0]
    bend = d * np.log(d) if is_rl else d**2
    (a, b), *_ = np.linalg.lstsq(np.stack([d, -bend], 1), y, rcond=None)
    rest = y - (a * d - b * bend)
    return a, b, 1 - (rest**2).sum() / ((y - y.mean()) ** 2).sum()


def draw(cfg, lab, rows):
    """The picture, and a table of the fits."""
    plt = picture.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    first, *penalties = cfg.kl_coefs
    for ax, by in zip(axes, ("best of n", f"kl_coef {first}")):
        is_rl = by != "best of n"
        for shade, n in zip(np.linspace(0.75, 0.0, len(cfg.feedback)), cfg.feedback):
            d, proxy, gold = curves(cfg, rows, by=by, feedback=n)
            a, b, fit = fitted(d.flatten(), gold.flatten(), is_rl)
            mean = fitted(d.mean(0), gold.mean(0), is_rl)[2]
            fits = f"a {a:6.3f}, b {b:6.3f}, R^2 {mean:.3f} ({fit:.3f})"
            print(f"{by:12} {n:5} prompts judged: {fits}")
            colour = {"color": plt.cm.viridis(shade)}
            ax.plot(d.mean(0), gold.mean(0), "-", label=f"gold, {n} prompts judged", **colour)
            ax.plot(d.mean(0), proxy.mean(0), "--", **colour)
            ax.plot(d.T, gold.T, ".", alpha=0.6, **colour)
            for coef in penalties if is_rl else ():  # where the runs with a penalty end
                d, _, gold = curves(cfg, rows, by=f"kl_coef {coef}", feedback=n)
                ax.plot(d.mean(0)[-1], gold.mean(0)[-1], "D", ms=6, mec="black", **colour)
        ax.set_title(f"PPO, --kl_coef {first:g}" if is_rl else by)
        ax.set_xlabel("distance from SFT: square root of KL in nats")
        ax.set_ylabel("gain over SFT: gold in utility, score in sd")
    axes[0].plot([], [], "--", color="grey", label="reward model's score")
    axes[0].legend()
    coefs = ", ".join(f"{coef:g}" for coef in penalties)
    axes[1].plot([], [], "D", color="grey", label=f"gold at the end with --kl_coef {coefs}")
    axes[1].legend(loc="lower left")
    lab.save(figure, "lines: means; points: gold of each run")


def curves(cfg, rows, **key):
    """(distance, proxy, gold), each (seeds, points), the last two less their first value."""
    columns = (numbers(rows, name, **key) for name in ("kl", "proxy", "gold"))
    kl, proxy, gold = (column.reshape(len(cfg.seeds), -1) for column in columns)
    return np.sqrt(kl.clip(min=0)), proxy - proxy[:, :1], gold - gold[:, :1]


if __name__ == "__main__":
    main(from_cli(Config))
