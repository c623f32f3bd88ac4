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
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import train_ppo
from experiments.lab import Lab, LabConfig, folder_of, interval, quietly, reward_of, sft_of
from nanorlhf import judging, load, picture
from nanorlhf.config import arg, from_cli
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
MODELS |= {"PPO": "PPO", "PPO-ptx": "PPO-ptx"}


@dataclass
class Config(LabConfig):
    """Win rates against the largest SFT model, for three sizes."""

    steps: int = arg(24, "iterations of PPO")
    ptx_coef: float = arg(0.5, "weight of the pretraining loss in PPO-ptx")
    prompts: int = arg(1024, "held-out prompts that each model answers")


def main(cfg):
    if cfg.quick:
        cfg.seeds, cfg.steps, cfg.prompts = [1], 2, 16
    lab = Lab(cfg, "instructgpt_figure1", "seed size model measure value", "steps ptx_coef prompts")
    settings = [{"seed": seed, "size": size} for size in SIZES for seed in cfg.seeds]
    rows = lab.each(measured, [key for key in settings if key["size"] == "large"])
    rows += lab.each(measured, settings[: -len(cfg.seeds)])  # these are compared to the largest
    found = {}
    for r in rows:
        found.setdefault((r["size"], r["model"], r["measure"]), []).append(float(r["value"]))
    draw(cfg, lab, {key: (*interval(values), values) for key, values in found.items()})


def measured(lab, seed, size):
    names = "model", "measure", "value"
    return [dict(zip(names, found)) for found in measures(lab.cfg, seed, size)]


def place(cfg, seed, size):
    """The folder of a size's models; the medium ones are those of all experiments."""
    return folder_of(cfg, seed, size.replace("medium", ""))


def measures(cfg, seed, size):
    """Trains all models of a size, and yields what is measured of each: (model, measure, value)."""
    rate, sizes = SIZES["small" if cfg.quick and size == "large" else size]
    out, name = place(cfg, seed, size), size.replace("medium", "")
    gpt, sft = sft_of(cfg, seed, name, rate, **sizes)
    about = {"init": sft, "reward": reward_of(cfg, sft, seed, rate), "seed": seed}
    about |= {"learning_rate": 3e-4 * rate, "max_steps": cfg.steps, "save_every": cfg.steps}
    coefs = {f"{out}/PPO-{cfg.steps}": 0.0, f"{out}/PPO-ptx-{cfg.steps}": cfg.ptx_coef}
    for to, coef in coefs.items():
        quietly(train_ppo, train_ppo.Config(**about, out_dir=to, ptx_coef=coef))
    shots = best_shots(cfg, gpt, seed)
    models = [f"{name}={to}" for name, to in zip(("PPO", "PPO-ptx"), coefs)]
    about = {"out": out, "models": models, "prompts": cfg.prompts, "shots": shots, "seed": seed}
    with redirect_stdout(StringIO()):
        rungs = evaluate.main(evaluate.Config(**about, best_of_prompts=2))
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
    asked, texts = prompts("held_out", 16 if cfg.quick else 256, f"shots/{seed}"), {}
    for n in (0, 1, 2, 3):
        rng = random.Random(f"shots/{seed}")
        pages = [judging.few_shot(rng, prompt, n) for prompt in asked]
        ids = judging.complete(gpt, tokenizer, pages, 128, seed, progress=f"{n} shots")
        texts[n] = [tokenizer.decode(row) for row in ids]
    wins = {
        n: judging.preferred(asked, texts[n], texts[0], TRAIN_LABELERS, seed) for n in (1, 2, 3)
    }
    return max(wins, key=wins.get)


def win(cfg, seed, mine, other, panel=TRAIN_LABELERS):
    """How often a model's answers are preferred to another's; each model is (size, name)."""
    both = []
    for size, model in (mine, other):
        path = Path(place(cfg, seed, size), "ladder", f"{model}.jsonl")
        both.append([json.loads(line) for line in path.read_text().splitlines()])
    texts, others = ([row["response"] for row in rows] for rows in both)
    return judging.preferred([row["prompt"] for row in both[0]], texts, others, panel, seed)


def draw(cfg, lab, found):
    """The paper's figure, and all numbers: {(size, model, measure): (mean, half, values)}."""
    for key, (mean, half, _) in found.items():
        print(f"{' '.join(key):44} {mean:.3f} +- {half:.3f}")
    plt = picture.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4), sharey=True)
    millions = [found[size, "base", "parameters"][0] / 1e6 for size in SIZES]
    for ax, panel in zip(axes, PANELS):
        for i, (model, name) in enumerate(MODELS.items()):
            means, halves, values = zip(*(found[size, model, panel] for size in SIZES))
            x = [m * 1.06 ** (i - 2) for m in millions]  # side by side
            line = ax.errorbar(x, means, halves, capsize=3, marker="o", label=name)
            ax.plot(x, values, "x", color=line[0].get_color(), ms=5)
        ax.set(xscale="log", xlabel="parameters, millions", title=f"judged by {panel}", ylim=(0, 1))
        ax.set_xticks(millions, [f"{m:.2f}" for m in millions])
        ax.minorticks_off()
    axes[0].set_ylabel("win rate against the largest SFT model")
    axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(
        f"mean over {picture.seeds(cfg.seeds)}, with 95 % intervals; crosses: the seeds"
    )
    picture.save(figure, str(lab.folder / "instructgpt_figure1.png"))


if __name__ == "__main__":
    main(from_cli(Config))
