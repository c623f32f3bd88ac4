"""Question: what does each algorithm make of the same feedback, and how far does it go for it?

    python -m experiments.algorithms                     # 3 seeds, about 2 hours of one core
    python -m experiments.algorithms --models mine=out/mine     # a row for your own fork
    python -m experiments.algorithms --quick

PPO, RLOO, GRPO, DPO and rejection sampling (RFT) start from one SFT model, with one reward model
or with the feedback that it has learned from. Each has four settings, tried on --tuning_seeds. The
one whose answers training labelers prefer to SFT's most often runs on --seeds. Best of n trains
nothing and samples n answers to each prompt. Your own fork should start from models/1/sft and
models/1/rm in the folder of all experiments.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import train_ppo
from experiments import peer_trl, peers, train_dpo, train_rft, train_rloo
from experiments.lab import (
    Lab,
    LabConfig,
    best_of_n,
    interval,
    judged,
    models_of,
    quietly,
    samples_of,
    sft_of,
)
from nanorlhf import picture
from nanorlhf.config import arg, die, from_cli
from nanorlhf.data import world
from nanorlhf.judging import named

COST = [{"kl_coef": c, "learning_rate": r} for c in (0.05, 0.1) for r in (3e-4, 6e-4)]
BETA = [{"beta": b, "learning_rate": r} for b in (0.05, 0.1) for r in (2e-4, 5e-4)]
BEST = [{"best_of": n, "prompts": 8000 // n, "epochs": e} for n in (8, 16) for e in (2, 4)]
ALGORITHMS = {  # (script, its settings)
    "PPO": (train_ppo, COST),
    "RLOO": (train_rloo, [{"baseline": "rloo"} | cost for cost in COST]),
    "GRPO": (train_rloo, [{"baseline": "grpo"} | cost for cost in COST]),
    "DPO": (train_dpo, BETA),
    "RFT": (train_rft, BEST),
    "TRL's PPO": (peer_trl, COST),
}
TRIALS = {  # (algorithm, setting as text) -> flags
    (name, ", ".join(f"{flag} {value}" for flag, value in flags.items())): flags
    for name, (_, settings) in ALGORITHMS.items()
    for flags in settings
}


@dataclass
class Config(LabConfig):
    """PPO, RLOO, GRPO, DPO, RFT and best of n, each at the best of four settings."""

    tuning_seeds: list[int] = arg([11, 12], "on which settings are chosen")
    steps: int = arg(24, "iterations of PPO, RLOO and GRPO, of 128 responses each")
    prompts: int = arg(512, "held-out prompts that each model answers")
    samples: int = arg(64, "responses to a prompt, of which the best of n is taken")
    models: list[str] = arg([], "rows of your own: FOLDER, or NAME=FOLDER")
    trl: str = arg("", "folder of TRL 1.10, whose PPO is then one of them: experiments/peer_trl.py")


def main(cfg):
    if cfg.quick:
        cfg.seeds, cfg.tuning_seeds, cfg.steps, cfg.prompts, cfg.samples = [1], [2], 2, 16, 4
    columns = "seed algorithm setting minutes samples gold win kl length"
    lab = Lab(cfg, "algorithms", columns, "steps prompts samples")
    own = [named(word) for word in cfg.models]
    if lacking := [folder for _, folder in own if not Path(folder).is_dir()]:
        die(f"--models: no folder {lacking[0]}")
    peers.import_from("--trl", cfg.trl, peers.TRL_FILE)
    of_arms = lambda arms, seeds: [
        {"seed": seed, "algorithm": name, "setting": text} for name, text in arms for seed in seeds
    ]
    trials = [arm for arm in TRIALS if cfg.trl or ALGORITHMS[arm[0]][0] is not peer_trl]
    tried = lab.each(trained, of_arms(trials[:: 4 if cfg.quick else 1], cfg.tuning_seeds))
    win = lambda arm: of(tried, "win", *arm)[0]
    arms = dict.fromkeys((row["algorithm"], row["setting"]) for row in tried)
    names = dict.fromkeys(name for name, _ in arms)
    best = [max((arm for arm in arms if arm[0] == name), key=win) for name in names]
    rows = lab.each(trained, of_arms(best, cfg.seeds))
    rows += lab.each(best_of_each_n, [{"seed": s, "algorithm": "best of n"} for s in cfg.seeds])
    for name, folder in own:  # not kept: who trains a fork again wants it measured again
        about = {"algorithm": name, "setting": folder}
        rows.append(about | judged(folder, sft_of(cfg, 1)[1], 1, cfg.prompts))
    draw(cfg, lab, tried, rows)


def of(rows, column, name, setting):
    """(mean over seeds, half of its interval) of a column."""
    mine = [r for r in rows if r["algorithm"] == name and r["setting"] == setting]
    return interval([float(r[column]) for r in mine if r.get(column, "") != ""] or [math.nan])


def trained(lab, seed, algorithm, setting):
    """Train with one setting; what the answers are then worth."""
    cfg, (sft, reward) = lab.cfg, models_of(lab.cfg, seed)
    script, flags = ALGORITHMS[algorithm][0], TRIALS[algorithm, setting]
    place = list(TRIALS).index((algorithm, setting))
    about = {"init": sft, "seed": seed, "out_dir": f"{lab.folder}/{algorithm}_{seed}_{place}"}
    if script is train_dpo:
        samples, more = 0, {"data": [f"{reward}/feedback.jsonl"]}
    elif script is train_rft:
        more = {"reward": reward, "prompts": flags["prompts"] // (100 if cfg.quick else 1)}
        samples = (more["prompts"] + more["prompts"] // 10) * flags["best_of"]
    else:
        more = {"reward": reward, "max_steps": cfg.steps}
        more |= {"trl": cfg.trl} if script is peer_trl else {"eval_every": cfg.steps}
        samples = cfg.steps * 128
    folder = quietly(script, script.Config(**about | flags | more))
    return [{"samples": samples} | judged(folder, sft, seed, cfg.prompts)]


def best_of_each_n(lab, seed, algorithm):
    """Best of n trains nothing: a row for each n."""
    (sft, reward), n = models_of(lab.cfg, seed), lab.cfg.samples
    prompts = world.prompts("held_out", 4 if lab.cfg.quick else 128, f"judged/{seed}")
    found = best_of_n(reward, samples_of(sft, prompts, n, seed))
    return [{"setting": f"n {r['step']}", "kl": r["kl"], "gold": r["gold"]} for r in found]


def draw(cfg, lab, tried, rows):
    """Gold against KL: settings tried, the chosen ones with intervals, and best of n."""
    plt = picture.pyplot()
    figure, ax = plt.subplots(figsize=(7, 4.4))
    arms = list(dict.fromkeys((r["algorithm"], r["setting"]) for r in rows))
    curve = [
        [of(rows, c, *arm)[0] for c in ("kl", "gold")] for arm in arms if arm[0] == "best of n"
    ]
    ax.plot(*zip(*curve), "k--", lw=1, label="best of n")
    looks = {
        name: (mark, colour) for name, mark, colour in zip(ALGORITHMS, "os^DvP", picture.COLOURS)
    }
    for name, setting in dict.fromkeys((r["algorithm"], r["setting"]) for r in tried):
        mark, colour = looks[name]
        x, y = (of(tried, c, name, setting)[0] for c in ("kl", "gold"))
        ax.plot(x, y, mark, color=colour, alpha=0.35)
    for name, setting in arms:
        found = {c: of(rows, c, name, setting) for c in ("gold", "win", "kl", "minutes", "samples")}
        known = [(c, *mean) for c, mean in found.items() if mean[0] == mean[0]]  # nan is none
        text = ", ".join(f"{c} {mean:.2f} +- {half:.2f}" for c, mean, half in known)
        print(f"{name:10} {text}  ({setting})")
        if name != "best of n":
            mark, colour = looks.get(name, ("*", "black"))
            (x, dx), (y, dy) = found["kl"], found["gold"]
            about = {"color": colour, "capsize": 3, "ms": 9, "label": name}
            ax.errorbar(x, y, dy, dx, fmt=mark, **about)
    ax.set_xlabel("KL from the SFT model, nats per response")
    ax.set_ylabel("gold utility")
    tuned = f"small: four settings each on {picture.seeds(cfg.tuning_seeds)}"
    ax.set_title(f"mean and 95 % intervals over {picture.seeds(cfg.seeds)}; {tuned}")
    ax.legend()
    picture.save(figure, str(lab.folder / "algorithms.png"))


if __name__ == "__main__":
    main(from_cli(Config))
