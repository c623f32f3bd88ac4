"""Question: which kind of feedback teaches most in the same time of people, and where should the
reward model start? (InstructGPT ranks and starts from a pretrained model: arXiv:2203.02155, 3.5.)

    python -m experiments.kinds_of_feedback              # 3 seeds, about 2 hours of one core
    python -m experiments.kinds_of_feedback --hours 2
    python -m experiments.kinds_of_feedback --quick

Labelers of the panel spend --hours on comparisons, on rankings of 4 to 9 responses, on ratings of 0
to 5 stars, or on likes and dislikes. --seconds says how long one judgement takes; a ranking takes
its number once per response. A reward model reads all judgements twice or oftener, for --rm_steps
at least, and the best of its four checkpoints on held-out prompts is used; their judgements are
not part of the hours. Each start and kind is then worth what PPO makes of it.
"""

from dataclasses import dataclass

from experiments.lab import Lab, LabConfig, interval, judged, numbers, ppo_of, rm_of, sft_of, spread
from nanorlhf import picture
from nanorlhf.config import arg, die, from_cli

JUDGED = {"comparisons": 2, "rankings": 6.5, "ratings": 4, "thumbs": 4}  # of a prompt, on average
STARTS = ("the SFT model", "the GPT", "random weights")


@dataclass
class Config(LabConfig):
    """Four kinds of feedback and three starts of the reward model, for the same hours of people."""

    QUICK = {"seeds": [1], "hours": 0.3, "rm_steps": 4, "steps": 2, "prompts": 16}
    hours: float = arg(1.0, "of labelers' time", low=0.1)
    seconds: list[int] = arg([20, 14, 10, 6], f"for one of the {', '.join(JUDGED)}", low=1)
    rm_steps: int = arg(76, "optimizer steps of each reward model, at least")
    steps: int = arg(24, "iterations of PPO")
    prompts: int = arg(512, "held-out prompts that each policy answers")


def main(cfg):
    columns = "seed kind start judged_prompts gold win kl length"
    lab = Lab(cfg, "kinds_of_feedback", columns, "hours seconds rm_steps steps prompts")
    prompts_of(cfg, "comparisons")  # a mistake in --seconds ends here
    arms = [(kind, start) for kind in JUDGED for start in STARTS][:: 5 if cfg.quick else 1]
    keys = [{"seed": s, "kind": kind, "start": start} for kind, start in arms for s in cfg.seeds]
    draw(cfg, lab, lab.each(learned, keys), arms)


def prompts_of(cfg, kind):
    """How many prompts' responses are judged in the hours that there are."""
    if len(cfg.seconds) != len(JUDGED):
        die(f"--seconds needs {len(JUDGED)} numbers: for {', '.join(JUDGED)}")
    seconds = dict(zip(JUDGED, cfg.seconds))
    return round(3600 * cfg.hours / seconds[kind] / JUDGED[kind])


def learned(lab, seed, kind, start):
    cfg, (gpt, sft) = lab.cfg, sft_of(lab.cfg, seed)
    to, n = f"{lab.folder}/{seed}_{kind}_{start.split()[-1]}", prompts_of(cfg, kind)
    steps = max(cfg.rm_steps, 2 * (n if kind == "rankings" else n * JUDGED[kind]) // 16)
    flags = {"init": gpt if start == "the GPT" else sft, "from_scratch": start == STARTS[2]}
    flags |= {"sft": sft, "feedback": kind, "prompts": n, "max_steps": steps}
    flags |= {"eval_every": max(1, steps // 4), "save_every": max(1, steps // 4)}
    reward = rm_of(cfg, f"{to}_rm", seed, **flags)
    ppo = ppo_of(cfg, f"{to}_ppo", seed, sft, reward)
    return [{"judged_prompts": n} | judged(ppo, sft, seed, cfg.prompts)]


def draw(cfg, lab, rows, arms):
    figure, axes = picture.pyplot().subplots(1, 2, figsize=(10, 3.8))
    names = {"gold": "gold utility", "win": "win rate against SFT, by training labelers"}
    for kind, start in arms:
        text, k = f"{kind:12} from {start:15}", STARTS.index(start)
        look = {"fmt": "os^"[k], "color": picture.COLOURS[k]}
        look["label"] = f"from {start}" if kind == arms[0][0] else None
        for ax, name in zip(axes, names):
            values = numbers(rows, name, kind=kind, start=start)
            spread(ax, [list(JUDGED).index(kind) + 0.2 * (k - 1)], [values], **look)
            text += f", {name} {interval(values):.3f}"
        print(f"{text}, {prompts_of(cfg, kind)} prompts judged")
    for ax, name in zip(axes, names):
        ax.set(xticks=range(len(JUDGED)), xticklabels=JUDGED, ylabel=names[name])
    axes[0].legend()
    title = f"PPO after {cfg.hours:g} h of labelers' time"
    lab.save(figure, f"{title}: means with 95 % intervals; crosses: the runs")


if __name__ == "__main__":
    main(from_cli(Config))
