"""Claim: labelers prefer PPO over SFT over prompted GPT over GPT, at every size, and the smallest
PPO over the largest GPT (InstructGPT, arXiv:2203.02155, figure 1).

    python -m experiments.instructgpt_figure1               # 3 seeds, about 4 hours of one core
    python -m experiments.instructgpt_figure1 --quick

Three sizes, 40 times apart in parameters. A labeler, drawn for each held-out prompt, sees an answer
of a model and one of the largest SFT model of that seed, and says which is better, with noise;
gold has no part in it. How many examples the few-shot prompt has is chosen by training labelers,
on other prompts. PPO-ptx mixes the pretraining loss in, so that the policy forgets less text.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from experiments.lab import Lab, LabConfig, folder_of, interval, models_of, numbers, ppo_of, spread
from nanorlhf import judging, load, picture
from nanorlhf.config import arg, from_cli
from nanorlhf.data.files import read_records
from nanorlhf.data.world import HELD_OUT_LABELERS, TRAIN_LABELERS, prompts
from nanorlhf.tools import evaluate

LARGE = {"n_layer": 4, "n_head": 8, "d_model": 320, "documents": 24000, "max_steps": 1260}
SIZES = {  # (factor of the demo's learning rates, other flags of train_gpt.py)
    "small": (1.0, {"n_layer": 1, "d_model": 64}),
    "medium": (1.0, {}),
    "large": (0.5, LARGE | {"eval_every": 420, "save_every": 420}),
}
PANELS = {"training labelers": TRAIN_LABELERS, "held-out labelers": HELD_OUT_LABELERS}
MODELS = {"base": "GPT", "base_fewshot": "GPT, few-shot", "sft": "SFT"}
MODELS |= {name: name for name in ("PPO", "PPO-ptx")}


@dataclass
class Config(LabConfig):
    """Win rates against the largest SFT model, for three sizes."""

    QUICK = {"seeds": [1], "steps": 2, "prompts": 16}
    steps: int = arg(24, "iterations of PPO")
    ptx_coef: float = arg(0.5, "weight of the pretraining loss in PPO-ptx")
    prompts: int = arg(1024, "held-out prompts that each model answers")


def main(cfg):
    lab = Lab(cfg, "instructgpt_figure1", "seed size model measure value", "steps ptx_coef prompts")
    keys = [{"seed": seed, "size": size} for size in SIZES for seed in cfg.seeds]
    rows = lab.each(measured, keys[-len(cfg.seeds) :])  # the largest, which all are compared to
    draw(cfg, lab, rows + lab.each(measured, keys[: -len(cfg.seeds)]))


def measured(lab, seed, size):
    return [dict(zip(("model", "measure", "value"), row)) for row in measures(lab.cfg, seed, size)]


def measures(cfg, seed, size):
    """Trains all models of a size, and yields what is measured of each: (model, measure, value)."""
    rate, sizes = SIZES["small" if cfg.quick and size == "large" else size]
    out, (gpt, sft, reward) = folder_of(cfg, seed, size), models_of(cfg, seed, size, rate, **sizes)
    policies = []
    for model, coef in (("PPO", 0.0), ("PPO-ptx", cfg.ptx_coef)):
        to, flags = f"{out}/{model}-{cfg.steps}", {"learning_rate": 3e-4 * rate, "ptx_coef": coef}
        policies.append(f"{model}={ppo_of(cfg, to, seed, sft, reward, **flags)}")
    shots = best_shots(cfg, gpt, seed)
    flags = {"out": out, "models": policies, "prompts": cfg.prompts, "shots": shots, "seed": seed}
    rungs = evaluate.main(evaluate.Config(**flags, best_of_prompts=2))
    yield "base", "parameters", sum(p.numel() for p in load(gpt)[0].parameters())
    yield "base_fewshot", "shots", shots
    for rung in rungs:
        if rung["model"] in MODELS:
            yield rung["model"], "gold", rung["gold"]
            yield rung["model"], "text loss", rung["lm_loss"]
    report = json.loads(Path(out, "rm", "report.json").read_text())
    for measure in ("accuracy", "accuracy_heldout_labelers", "labelers_agree"):
        yield "rm", measure, report[measure]
    for model in MODELS:
        for name, panel in PANELS.items():
            yield model, name, win(cfg, seed, (size, model), ("large", "sft"), panel)
    others = dict.fromkeys([(size, "base"), (size, "base_fewshot"), ("large", "base")])
    for model in ("PPO", "PPO-ptx"):
        for other in others:
            yield model, f"over {' '.join(other)}", win(cfg, seed, (size, model), other)


def best_shots(cfg, folder, seed):
    """The number of examples in the prompt that labelers prefer most often to no example."""
    gpt, tokenizer = load(folder)
    requests, texts = prompts("held_out", 16 if cfg.quick else 256, f"shots/{seed}"), {}
    for n in (0, 1, 2, 3):
        rng = random.Random(f"shots/{seed}")
        pages = [judging.few_shot(rng, prompt, n) for prompt in requests]
        ids = judging.complete(gpt, tokenizer, pages, 128, seed, progress=f"{n} shots")
        texts[n] = [tokenizer.decode(row) for row in ids]
    liking = lambda n: judging.preferred(requests, texts[n], texts[0], TRAIN_LABELERS, seed)
    return max((1, 2, 3), key=liking)


def win(cfg, seed, mine, other, panel=TRAIN_LABELERS):
    """How often a model's answers are preferred to another's; each model is (size, name)."""
    paths = [f"{folder_of(cfg, seed, size)}/ladder/{model}.jsonl" for size, model in (mine, other)]
    records, others = ([record for _, record in read_records([path])] for path in paths)
    both = ([record["response"] for record in side] for side in (records, others))
    return judging.preferred([record["prompt"] for record in records], *both, panel, seed)


def draw(cfg, lab, rows):
    """The paper's figure, and all numbers."""

    def of(size, model, measure):
        return numbers(rows, "value", size=size, model=model, measure=measure)

    for key in dict.fromkeys((r["size"], r["model"], r["measure"]) for r in rows):
        print(f"{' '.join(key):44} {interval(of(*key)):.3f}")
    figure, axes = picture.pyplot().subplots(1, 2, figsize=(9.5, 4), sharey=True)
    millions = [of(size, "base", "parameters").mean() / 1e6 for size in SIZES]
    for ax, panel in zip(axes, PANELS):
        for i, (model, name) in enumerate(MODELS.items()):
            x = [m * 1.06 ** (i - 2) for m in millions]  # side by side
            spread(ax, x, [of(size, model, panel) for size in SIZES], marker="o", label=name)
        ax.set(xscale="log", xlabel="parameters, millions", title=f"judged by {panel}", ylim=(0, 1))
        ax.set_xticks(millions, [f"{m:.2f}" for m in millions])
        ax.minorticks_off()
    axes[0].set_ylabel("win rate against the largest SFT model")
    axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    lab.save(figure, "means with 95 % intervals; crosses: the runs")


if __name__ == "__main__":
    main(from_cli(Config))
