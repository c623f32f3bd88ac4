"""Question: what cures a judge that is fooled, and what does the cure cost?

    python -m experiments.cures               # 3 seeds, about an hour of one core
    python -m experiments.cures --noise 0.25  # a quarter of the rankings is turned round
    python -m experiments.cures --only none "lowest of 3"
    python -m experiments.cures --quick

PPO without a penalty fools a reward model that knows few rankings of the SFT model's answers. Each
cure changes one thing: the KL penalty; three reward models that learn the same rankings in another
order and from other heads (arXiv:2310.02743); rankings for twice as many prompts more, which the
SFT model answers or, in a second round, the fooled policy (arXiv:2204.05862). Reward models and
policies all start from the SFT model.

Length (arXiv:2310.03716): how much of what is gained would the SFT model's own answers gain, if
they only had the lengths of the policy's? PPO and DPO learn from the same rankings, and from these
as people would give them who love length.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

import train_ppo
import train_rm
from experiments import train_dpo
from experiments.lab import Lab, LabConfig, curve_of, interval, numbers, quietly, sft_of, spread
from nanorlhf import generate, load, picture, score
from nanorlhf.config import arg, from_cli
from nanorlhf.data import world
from nanorlhf.data.files import write_records
from nanorlhf.feedback import collect_feedback
from nanorlhf.loading import load_gpt

WORDS = 5  # in a stratum of lengths; and worth one place in a ranking, to those who love length
CURES = {  # rankings, number of reward models, flags of PPO
    "none": ("first", 1, {}),
    **{f"penalty {coef}": ("first", 1, {"kl_coef": coef}) for coef in (0.02, 0.05, 0.1)},
    "mean of 3": ("first", 3, {"reward_weights": [1 / 3] * 3}),
    "lowest of 3": ("first", 3, {"reward_mix": "min"}),
    "uncertain 3": ("first", 3, {"reward_mix": "uncertain"}),
    "3 x feedback": ("first+more", 1, {}),
    "second round": ("first+second", 1, {}),
}
ARMS = CURES | {  # and those for length; DPO has no PPO
    "DPO": ("first", 1, None),
    "penalty 0.05, length": ("length", 1, {"kl_coef": 0.05}),
    "DPO, length": ("length", 1, None),
}
OF_EACH_KIND = ["none", "lowest of 3", "second round", "DPO, length"]  # for --quick


@dataclass
class Config(LabConfig):
    """PPO against a judge of little feedback, with one cure at a time."""

    QUICK = {"seeds": [1], "judged": 9, "steps": 1, "prompts": 8}
    judged: int = arg(60, "prompts whose answers are ranked at first")
    noise: float = arg(0.0, "share of rankings that are turned round", high=1)
    steps: int = arg(24, "iterations of PPO")
    prompts: int = arg(256, "held-out prompts")
    only: list[str] = arg([], "of CURES these alone; default: all", choices=tuple(CURES))


def main(cfg):
    columns = "seed cure rankings parameters minutes step kl proxy gold words sft_words score_gain"
    columns += " score_by_length gold_gain gold_by_length"
    lab = Lab(cfg, "cures", columns, "judged noise steps prompts")
    arms = cfg.only or (OF_EACH_KIND if cfg.quick else list(ARMS))
    rows = lab.each(measured, [{"seed": s, "cure": c} for s in cfg.seeds for c in arms])
    draw(cfg, lab, rows, arms)


def measured(lab, seed, cure):
    """The curve of a cure's PPO, with its costs; its last row says what lengths explain."""
    cfg, parts = lab.cfg, ARMS[cure][0]
    policy, *judges = trained(lab, seed, cure)
    made = [policy, *judges] + (trained(lab, seed, "none") if "second" in parts else [])
    seconds = sum(float(Path(run, "finished").read_text().split()[-1]) for run in made)
    cost = {"rankings": cfg.judged * (3 if "+" in parts else 1), "minutes": seconds / 60}
    cost["parameters"] = sum(p.numel() for j in judges for p in load(j)[0].parameters())
    rows = [{}] if "DPO" in cure else curve_of(policy)
    rows[-1] |= gains(cfg, seed, sft_of(cfg, seed)[1], policy, judges)
    return [cost | row for row in rows]


def trained(lab, seed, cure):
    """[policy, *its reward models]."""
    cfg, sft, (parts, n, flags) = lab.cfg, sft_of(lab.cfg, seed)[1], ARMS[cure]
    to = f"{lab.folder}/{seed}_{cfg.judged}_{cfg.noise}"
    more = {"init": sft, "data": [rankings(lab, seed, part, to) for part in parts.split("+")]}
    rms = [train_rm.Config(f"{to}/rm_{parts}_{i}", seed + 100 * i, **more) for i in range(n)]
    judges = [quietly(rm) for rm in rms]
    if flags is None:
        return [quietly(train_dpo.Config(f"{to}/{cure}", seed, **more)), *judges]
    flags = {"init": sft, "reward": judges, "kl_coef": 0.0, "max_steps": cfg.steps} | flags
    flags |= {"eval_every": max(1, cfg.steps // 6), "eval_prompts": cfg.prompts}
    return [quietly(train_ppo.Config(f"{to}/{cure}", seed, **flags)), *judges]


@cache
def rankings(lab, seed, part, to):
    """A file of rankings: the `first` ones; of `more` prompts; of the fooled policy's answers to
    these, in a `second` round; or the first ones as people would give them who love `length`."""
    cfg, sft, is_new = lab.cfg, sft_of(lab.cfg, seed)[1], part in ("more", "second")
    policy = trained(lab, seed, "none")[0] if part == "second" else sft
    flags = {"prompts": cfg.judged * (2 if is_new else 1), "heldout_prompts": cfg.judged // 3}
    asked = train_rm.Config(seed=seed + 1000 * is_new, init=sft, sft=policy, **flags)
    records, rng = collect_feedback(asked, load_gpt(sft)[1]), np.random.default_rng(asked.seed)
    for record in records:
        record["ranks"] = ranked(record, rng.random() < cfg.noise, part == "length")
    return write_records(f"{to}/{part}.jsonl", records)


def ranked(record, is_turned, loves_length):
    """Its ranks turned round, or as they are; and then by length, too."""
    pairs, sign = zip(record["completions"], record["ranks"]), -1 if is_turned else 1
    places = [sign * rank - loves_length * len(text.split()) / WORDS for text, rank in pairs]
    return [sorted(places).index(place) + 1 for place in places]


def gains(cfg, seed, sft, policy, judges):
    """What a policy's answers gain over the SFT model's in score (the mean of its judges) and gold,
    and what SFT's would gain by having the policy's lengths."""
    table = []
    for model in (sft, policy):
        prompts, texts = answers(model, cfg.prompts, seed)
        scores = np.mean([score(*load(judge), prompts, texts) for judge in judges], 0)
        words, gold = [len(text.split()) for text in texts], map(world.gold, prompts, texts)
        table.append(np.array([words, scores, list(gold)]))
    (old, *before), (new, *after) = table
    row = {"words": new.mean(), "sft_words": old.mean()}
    for name, x, y in zip(("score", "gold"), before, after):
        row[f"{name}_gain"] = y.mean() - x.mean()
        row[f"{name}_by_length"] = at_lengths(x, old, new) - x.mean()
    return row


@cache  # the SFT model's are compared with those of every cure
def answers(model, n, seed):
    """n held-out prompts, and a model's answers to them."""
    prompts = world.prompts("held_out", n, f"judged/{seed}")
    return prompts, generate(*load(model), prompts, seed=seed)


def at_lengths(values, old, new):
    """The mean of values whose lengths are `old`, weighted so that lengths are as often as in
    `new`: each of these counts as the mean value of its stratum, or of the nearest one there is."""
    strata = old // WORDS
    near = lambda stratum: strata == strata[np.abs(strata - stratum).argmin()]
    return np.mean([values[near(stratum)].mean() for stratum in new // WORDS])


def draw(cfg, lab, rows, arms):
    """The picture, and a table of how the runs ended."""
    cures = [arm for arm in arms if arm in CURES]
    of = lambda arm, name: numbers(rows, name, cure=arm).reshape(len(cfg.seeds), -1)
    figure, (left, right) = picture.pyplot().subplots(1, 2, figsize=(11, 4.4), sharey=True)
    for i, cure in enumerate(cures):
        d = np.sqrt(of(cure, "kl").clip(min=0)).mean(0)
        left.plot(d, of(cure, "gold").mean(0), marker="os"[i // 6], label=cure)
    spread(right, range(len(cures)), [of(cure, "gold")[:, -1] for cure in cures], fmt="o")
    for arm in arms:
        cells = (f"{name} {interval(of(arm, name)[:, -1]):.3g}" for name in lab.columns[2:-3])
        print(f"{arm:20}", ", ".join(cells))
    left.set(xlabel="distance from SFT: square root of KL in nats", ylabel="gold utility")
    left.legend()
    right.set_xticks(range(len(cures)), cures, rotation=30, ha="right")
    lab.save(figure, f"{cfg.judged} rankings; right: means with 95 % intervals, and each run")


if __name__ == "__main__":
    main(from_cli(Config))
