"""Question: what does each algorithm make of the same feedback, and how far does it go for it?

    python -m experiments.algorithms                     # 3 seeds, about 2 hours of one core
    python -m experiments.algorithms --only GRPO
    python -m experiments.algorithms --models mine=out/mine     # a row for your own fork
    python -m experiments.algorithms --quick

PPO, RLOO, GRPO, DPO and rejection sampling (RFT) start from one SFT model, with one reward model
or with the feedback that it has learned from. Each has four settings, tried on --tuning_seeds. The
one whose answers training labelers prefer to SFT's most often runs on --seeds. Best of n trains
nothing and samples n answers to each prompt. Your own fork should start from models/1_medium/sft
and models/1_medium/rm in the folder of all experiments.
"""

from dataclasses import dataclass
from pathlib import Path

import train_ppo
from experiments import peer_trl, train_dpo, train_rft, train_rloo
from experiments.lab import Lab, LabConfig, best_of_n, interval, judged, models_of, numbers, quietly
from nanorlhf import picture
from nanorlhf.config import arg, die, from_cli
from nanorlhf.data import world
from nanorlhf.judging import named

COST = [{"kl_coef": c, "learning_rate": r} for c in (0.05, 0.1) for r in (3e-4, 6e-4)]
BETA = [{"beta": b, "learning_rate": r} for b in (0.05, 0.1) for r in (2e-4, 5e-4)]
BEST = [{"best_of": n, "prompts": 8000 // n, "epochs": e} for n in (8, 16) for e in (2, 4)]
BEST_OF_N = "best of n"
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

    QUICK = {"seeds": [1], "tuning_seeds": [2], "steps": 2, "prompts": 16, "samples": 4}
    tuning_seeds: list[int] = arg([11, 12], "on which settings are chosen")
    steps: int = arg(24, "iterations of PPO, RLOO and GRPO, of 128 responses each")
    prompts: int = arg(512, "held-out prompts that each model answers")
    samples: int = arg(64, "responses to a prompt, of which the best of n is taken")
    only: list[str] = arg([], "of these algorithms alone; default: of all")
    models: list[str] = arg([], "rows of your own: FOLDER, or NAME=FOLDER")
    trl: str = arg("", "folder of TRL 1.10, whose PPO is then one of them: experiments/peer_trl.py")


def main(cfg):
    columns = "seed algorithm setting minutes samples gold win kl length"
    lab = Lab(cfg, "algorithms", columns, "steps prompts samples")
    own = [named(word) for word in cfg.models]
    if lacking := [folder for _, folder in own if not Path(folder).is_dir()]:
        die(f"--models: no folder {lacking[0]}")
    peer_trl.import_from("--trl", cfg.trl, peer_trl.TRL_FILE)
    usual = [name for name, (script, _) in ALGORITHMS.items() if cfg.trl or script is not peer_trl]
    if unknown := set(cfg.only) - {*usual, BEST_OF_N}:
        die(f"--only: {unknown.pop()} is none of {', '.join([*usual, BEST_OF_N])}")
    wanted = cfg.only or [*usual, BEST_OF_N]
    trials = [arm for arm in TRIALS if arm[0] in wanted]
    trials = trials[:: 4 if cfg.quick else 1]
    tried = lab.each(trained, keys_of(trials, cfg.tuning_seeds))
    win = lambda arm: numbers(tried, "win", algorithm=arm[0], setting=arm[1]).mean()
    names = dict.fromkeys(name for name, _ in trials)
    best = [max((arm for arm in trials if arm[0] == name), key=win) for name in names]
    rows = lab.each(trained, keys_of(best, cfg.seeds))
    if BEST_OF_N in wanted:
        rows += lab.each(best_of_each_n, [{"seed": s, "algorithm": BEST_OF_N} for s in cfg.seeds])
    for name, folder in own:  # not kept: who trains a fork again wants it measured again
        worth = judged(folder, models_of(cfg, 1)[1], 1, cfg.prompts)
        row = {"algorithm": name, "setting": folder, "samples": ""} | worth
        rows.append({column: str(value) for column, value in row.items()})
    draw(cfg, lab, tried, rows)


def keys_of(arms, seeds):
    """The keys of the rows of (algorithm, setting) pairs."""
    return [{"seed": s, "algorithm": name, "setting": text} for name, text in arms for s in seeds]


def trained(lab, seed, algorithm, setting):
    """Train with one setting; what the answers are then worth."""
    cfg, (_, sft, reward) = lab.cfg, models_of(lab.cfg, seed)
    script, flags = ALGORITHMS[algorithm][0], TRIALS[algorithm, setting]
    place = list(TRIALS).index((algorithm, setting))
    to = f"{lab.folder}/{algorithm}_{seed}_{place}"
    if script is train_dpo:
        samples, more = 0, {"data": [f"{reward}/feedback.jsonl"]}
    elif script is train_rft:
        more = {"reward": reward, "prompts": flags["prompts"] // (100 if cfg.quick else 1)}
        samples = (more["prompts"] + more["prompts"] // 10) * flags["best_of"]
    else:
        more = {"reward": reward, "max_steps": cfg.steps}
        more |= {"trl": cfg.trl} if script is peer_trl else {"eval_every": cfg.steps}
        samples = cfg.steps * 128
    kwargs = {"out_dir": to, "init": sft, "seed": seed} | flags | more
    folder = quietly(script.Config(**kwargs))
    return [{"samples": samples} | judged(folder, sft, seed, cfg.prompts)]


def best_of_each_n(lab, seed, algorithm):
    """Best of n trains nothing: a row for each n."""
    (_, sft, reward), n = models_of(lab.cfg, seed), lab.cfg.samples
    prompts = world.prompts("held_out", 4 if lab.cfg.quick else 128, f"judged/{seed}")
    return [{"setting": f"n {r['step']}"} | r for r in best_of_n(sft, reward, prompts, n, seed)]


def draw(cfg, lab, tried, rows):
    """Gold against KL: settings tried, the chosen ones with intervals, and best of n."""
    figure, ax = picture.pyplot().subplots(figsize=(7, 4.4))
    arms_of = lambda rows: dict.fromkeys((r["algorithm"], r["setting"]) for r in rows)
    looks = dict(zip(ALGORITHMS, zip("os^DvP", picture.COLOURS)))
    for name, setting in arms_of(tried):
        mark, colour = looks[name]
        x, y = (numbers(tried, c, algorithm=name, setting=setting).mean() for c in ("kl", "gold"))
        ax.plot(x, y, mark, color=colour, alpha=0.35)
    curve = []
    for name, setting in arms_of(rows):
        of = lambda column: interval(numbers(rows, column, algorithm=name, setting=setting))
        worth = {column: of(column) for column in ("gold", "win", "kl", "minutes", "samples")}
        known = [column for column in worth if worth[column].mean == worth[column].mean]  # no nan
        text = ", ".join(f"{column} {worth[column]:.2f}" for column in known)
        print(f"{name:10} {text}  ({setting})")
        (x, dx), (y, dy) = worth["kl"], worth["gold"]
        if name == BEST_OF_N:
            curve.append((x, y))
        else:
            mark, colour = looks.get(name, ("*", "black"))
            ax.errorbar(x, y, dy, dx, mark, color=colour, capsize=3, ms=9, label=name)
    if curve:
        ax.plot(*zip(*curve), "k--", lw=1, label=BEST_OF_N)
    ax.set(xlabel="KL from the SFT model, nats per response", ylabel="gold utility")
    ax.legend()
    tuned = f"small: four settings each on {lab.named(cfg.tuning_seeds)}"
    lab.save(figure, f"{tuned}; else means with 95 % intervals")


if __name__ == "__main__":
    main(from_cli(Config))
