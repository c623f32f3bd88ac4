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

import train_ppo
import train_rm
from experiments.lab import Lab, LabConfig, best_of_n, curve_of, quietly, samples_of, sft_of
from nanorlhf import picture
from nanorlhf.config import arg, from_cli
from nanorlhf.data import world


@dataclass
class Config(LabConfig):
    """Gold and proxy against the distance from SFT, for several amounts of feedback."""

    feedback: list[int] = arg([60, 200, 600], "prompts whose responses are ranked")
    kl_coefs: list[float] = arg([0.0, 0.02, 0.05, 0.1, 0.2], "of PPO")
    steps: int = arg(60, "iterations of PPO")
    samples: int = arg(256, "responses to a prompt, of which the best of n is taken")


def main(cfg):
    if cfg.quick:
        cfg.seeds, cfg.feedback, cfg.kl_coefs, cfg.steps, cfg.samples = [1], [40, 80], [0.0], 4, 16
    lab = Lab(cfg, "overoptimization", "seed feedback by step kl proxy gold", "steps samples")
    by = ["best of n", *(f"kl_coef {coef}" for coef in cfg.kl_coefs)]
    keys = [
        {"by": b, "feedback": n, "seed": s} for b in by for n in cfg.feedback for s in cfg.seeds
    ]
    draw(cfg, lab, lab.each(measured, keys))


def measured(lab, by, feedback, seed):
    """The curve of best of n or of a run of PPO."""
    cfg, sft, few = lab.cfg, sft_of(lab.cfg, seed)[1], {"prompts": feedback, "seed": seed}
    few |= {"heldout_prompts": 20} if cfg.quick else {}
    about = {"out_dir": f"{lab.folder}/rm_{seed}_{feedback}", "init": sft} | few
    reward = quietly(train_rm, train_rm.Config(**about))
    if by == "best of n":
        n_train, n_held_out = (3, 1) if cfg.quick else (90, 10)
        prompts = world.prompts("train", n_train, f"sample/{seed}")
        prompts += world.prompts("held_out", n_held_out, f"sample/{seed}")
        return best_of_n(reward, samples_of(sft, prompts, cfg.samples, seed))
    coef = by.split()[1]
    about = {"init": sft, "reward": reward, "kl_coef": float(coef), "seed": seed}
    about |= {"out_dir": f"{lab.folder}/ppo_{coef}_{seed}_{feedback}", "max_steps": cfg.steps}
    about |= {"eval_every": max(1, cfg.steps // 15), "save_every": cfg.steps}
    about |= {"eval_prompts": 16 if cfg.quick else 256}
    return curve_of(quietly(train_ppo, train_ppo.Config(**about)))


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
    for ax, is_rl in zip(axes, (False, True)):
        by = f"kl_coef {cfg.kl_coefs[0]}" if is_rl else "best of n"
        for shade, n in zip(np.linspace(0.75, 0.0, len(cfg.feedback)), cfg.feedback):
            mine = [r for r in rows if r["by"] == by and r["feedback"] == str(n)]
            d, proxy, gold = curves(mine, cfg.seeds)  # each (seeds, points)
            a, b, fit = fitted(d.flatten(), gold.flatten(), is_rl)
            mean = fitted(d.mean(0), gold.mean(0), is_rl)[2]
            print(
                f"{by:12} {n:5} prompts judged: a {a:6.3f}, b {b:6.3f}, R^2 {mean:.3f} ({fit:.3f})"
            )
            about, gold_of = {"color": plt.cm.viridis(shade)}, f"gold, {n} prompts judged"
            ax.plot(d.mean(0), gold.mean(0), "-", label=gold_of, **about)
            ax.plot(d.mean(0), proxy.mean(0), "--", **about)
            ax.plot(d.T, gold.T, ".", alpha=0.6, **about)
            for coef in cfg.kl_coefs[1:] if is_rl else ():  # where the runs with a penalty end
                mine = [r for r in rows if (r["by"], r["feedback"]) == (f"kl_coef {coef}", str(n))]
                d, _, gold = curves(mine, cfg.seeds)
                ax.plot(d.mean(0)[-1], gold.mean(0)[-1], "D", ms=6, mec="black", **about)
        ax.set_title("best of n" if not is_rl else f"PPO, --kl_coef {cfg.kl_coefs[0]:g}")
        ax.set_xlabel("distance from SFT: square root of KL in nats")
        ax.set_ylabel("gain over SFT: gold in utility, score in sd")
    axes[0].plot([], [], "--", color="grey", label="reward model's score")
    axes[0].legend()
    coefs = ", ".join(f"{coef:g}" for coef in cfg.kl_coefs[1:])
    axes[1].plot([], [], "D", color="grey", label=f"gold at the end with --kl_coef {coefs}")
    axes[1].legend(loc="lower left")
    figure.suptitle(f"mean over {picture.seeds(cfg.seeds)}; points: gold of each seed")
    picture.save(figure, str(lab.folder / "overoptimization.png"))


def curves(rows, seeds):
    """(distance, proxy, gold), each (seeds, points), the last two less their first value."""
    of = lambda name: np.array(
        [[float(r[name]) for r in rows if r["seed"] == str(seed)] for seed in seeds]
    )
    d, proxy, gold = np.sqrt(of("kl").clip(min=0)), of("proxy"), of("gold")
    return d, proxy - proxy[:, :1], gold - gold[:, :1]


if __name__ == "__main__":
    main(from_cli(Config))
