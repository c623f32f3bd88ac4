"""Claim: PPO fools a judge that was learned, and cannot fool a verifier (arXiv:2411.15124, RLVR).

    python -m experiments.two_judges              # 3 seeds, about 15 minutes of one core
    python -m experiments.two_judges --quick

A tiny model learns to sort letters, in part. PPO starts from it twice, with the same flags. RLVR's
reward is the verifier `right` below: 0 or 1. RLHF's is a reward model, in sd of its scores of SFT
answers. It has learned from --labels of those, to other words, each liked if it was right and else
disliked. No label is wrong: what the policy finds are the reward model's own mistakes.

Does RL teach, or choose among what the model could say before? pass@k is the probability that one
of k answers is right. If RL only chooses, then SFT catches up as k grows (arXiv:2504.13837).
"""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import train_gpt
import train_ppo
import train_rm
import train_sft
from experiments.lab import Lab, LabConfig, curve_of, interval, numbers, quietly
from nanorlhf import generate, load, picture
from nanorlhf.config import arg, from_cli
from nanorlhf.data.files import write_records

VERIFIER = f"{Path(__file__).resolve()}:right"
KS = [2**i for i in range(7)]  # of pass@k


@dataclass
class Config(LabConfig):
    """PPO with a verifier, and with a reward model that has learned from the verifier's labels."""

    QUICK = {"seeds": [1], "text_steps": 100, "labels": 600, "steps": 2, "pass_words": 2}
    text_steps: int = arg(600, "optimizer steps of the GPT on sorted words")
    labels: int = arg(16000, "answers of the SFT model that are liked or disliked")
    steps: int = arg(60, "iterations of PPO")
    kl_coef: float = arg(0.0, "weight of PPO's KL penalty in both runs")
    pass_words: int = arg(128, "held-out words of pass@k, each sorted 128 times", high=512)


def right(prompts, responses, answer):
    """The verifier: 1 for the right answer, else 0."""
    return [float(response == known) for response, known in zip(responses, answer)]


def liked(records, responses):
    """Likes and dislikes of responses, by the truth."""
    pairs = zip(records, responses)
    return [r | {"completion": text, "label": text == r["answer"]} for r, text in pairs]


def passes(answers, model, records):
    """{column: the mean of pass@k over records}: arXiv:2107.03374, eq. 1, which has no bias. Of n
    answers c are right; k that are drawn from the n are all wrong in C(n - c, k) of C(n, k) cases.
    """
    n = 2 * KS[-1]
    texts, known = answers(model, np.repeat(records, n)), [r["answer"] for r in records]
    right = [texts[i * n : (i + 1) * n].count(answer) for i, answer in enumerate(known)]
    wrong = lambda k: np.mean([math.comb(n - c, k) / math.comb(n, k) for c in right])
    return {f"pass_{k}": 1 - wrong(k) for k in KS}


def main(cfg):
    columns = "seed judge accuracy step kl proxy gold " + " ".join(f"pass_{k}" for k in KS)
    lab = Lab(cfg, "two_judges", columns, "text_steps labels steps pass_words kl_coef")
    draw(cfg, lab, lab.each(curves, [{"seed": seed} for seed in cfg.seeds]))


def curves(lab, seed):
    """Rows of both PPO runs, after all that they need; prints some answers of their policies."""
    cfg, to = lab.cfg, lab.folder / f"{seed}_{lab.cfg.labels}"
    short = {"max_new_tokens": 16, "seed": seed}
    file = lambda name, records: [str(write_records(to / f"{name}.jsonl", records))]
    make = lambda stage, name, **flags: quietly(stage.Config(f"{to}/{name}", **flags))
    answers = lambda model, words: generate(*load(model), [r["prompt"] for r in words], **short)
    rng, n = random.Random(f"two judges/{seed}"), 41512 + cfg.labels  # fromkeys: no word twice
    words = dict.fromkeys("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=8)) for _ in range(n))
    records = [{"prompt": f"Sort {word}.", "answer": "".join(sorted(word))} for word in words]
    text, demos, held_out, train, judged = np.split(records, [24000, 25000, 25512, 41512])
    page = {"text": "\n".join(f"{r['prompt']} {r['answer']}" for r in text)}
    flags = {"data": file("text", [page]), "tokenizer": "bytes", "block_size": 64, "seed": seed}
    gpt = make(train_gpt, "gpt", short_steps=0.0, batch_size=32, max_steps=cfg.text_steps, **flags)
    flags = {"data": file("demos", demos), "columns": ["completion=answer"]}
    sft = make(train_sft, "sft", init=gpt, **flags, **short)
    flags = {"data": file("labels", liked(judged, answers(sft, judged))), "eval_every": 100}
    rm = make(train_rm, "rm", init=sft, epochs=4, batch_size=32, **flags, **short)
    accuracy = json.loads(Path(rm, "report.json").read_text())["accuracy"]
    flags = {"data": file("train", train), "val_data": file("held_out", held_out), "gold": VERIFIER}
    flags |= {"kl_coef": cfg.kl_coef, "max_steps": cfg.steps, "eval_every": max(1, cfg.steps // 30)}
    flags |= {"learning_rate": 1e-3, "warmup_steps": 10, "batch_size": 512, "minibatch_size": 256}
    rows, some, tried = [], held_out[:3], held_out[: cfg.pass_words]
    before = passes(answers, sft, tried)
    for judge, reward, share in (("verifier", VERIFIER, 1.0), ("reward model", rm, accuracy)):
        name = f"{judge.replace(' ', '_')}_{cfg.kl_coef}_{cfg.steps}"
        ppo = make(train_ppo, name, init=sft, reward=reward, eval_prompts=512, **flags, **short)
        first, *others, last = curve_of(ppo)
        curve = [first | before, *others, last | passes(answers, ppo, tried)]
        rows += [{"judge": judge, "accuracy": share} | row for row in curve]
        print([r["prompt"] for r in some], f"after PPO with the {judge}:", answers(ppo, some))
    return rows


def line(ax, x, y, label, **look):
    """The mean of curves x, y (seeds, points), and each of them, faint."""
    ax.plot(x.T, y.T, **look, lw=0.8, alpha=0.4)
    ax.plot(x.mean(0), y.mean(0), **look, lw=2.2, label=label)
    ax.legend()


def draw(cfg, lab, rows):
    """The picture, and a table of how the runs began and ended."""
    figure, axes = picture.pyplot().subplots(1, 3, figsize=(14, 4))
    of = lambda judge, name: numbers(rows, name, judge=judge).reshape(len(cfg.seeds), -1)
    blue, orange = {"color": "#1f3a5f", "ls": "-"}, {"color": "#d1662b", "ls": "--"}
    for judge, look in (("verifier", blue), ("reward model", orange)):
        gold = of(judge, "gold")
        line(axes[0], of(judge, "step"), gold, f"PPO with the {judge}", **look)
        ends = " -> ".join(f"{interval(x):.2f}" for x in gold.T[[0, -1]])
        share = of(judge, "accuracy").mean()
        print(f"{judge:12} judges {share:.0%} of SFT answers rightly: {ends} right")
        before, after = np.array([of(judge, f"pass_{k}")[:, [0, -1]] for k in KS]).T
        for k, *shares in zip(KS, before.T, after.T):
            print(f"    pass@{k:<3}", " -> ".join(f"{interval(x):.2f}" for x in shares))
        line(axes[2], np.array([KS] * len(after)), after, f"PPO with the {judge}", **look)
    line(axes[2], np.array([KS] * len(before)), before, "SFT", color="0.3", ls=":")
    d, score, truth = (of("reward model", name) for name in ("kl", "proxy", "gold"))
    d = np.sqrt(d.clip(min=0))
    line(axes[1], d, score, "what the reward model says: score", color="0.3", ls=":")
    line(axes[1], d, truth, "the truth: share of right answers", **orange)
    axes[0].set(xlabel="iterations of PPO", ylabel="share of right answers, held out", ylim=(0, 1))
    axes[1].set(xlabel="distance from SFT: square root of KL in nats", ylabel="score in sd; share")
    axes[2].set(xlabel="k answers", xscale="log", ylabel="pass@k: one is right", ylim=(0, 1))
    lab.save(figure, f"sorting letters, --kl_coef {cfg.kl_coef:g}: each run, faint, and means")


if __name__ == "__main__":
    main(from_cli(Config))
