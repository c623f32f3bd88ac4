"""Claim: a person need judge fewer pairs where the reward model chooses which (active learning).

    python -m experiments.uncertain                  # 5 seeds, about 20 minutes of one core
    python -m experiments.uncertain --quick

Labelers of the panel judge 100 random pairs of responses of out/sft; a reward model learns from
them and chooses the next 100, and so on: by the smallest margin of one model ("margin"), by the
disagreement of three ("committee"), or at random. Accuracy is against gold, on pairs of other
prompts' responses. `label --next uncertain` is the first with one --reward, the second with more.
"""

import random
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

import train_rm
from experiments.lab import Lab, LabConfig, alone, digest, samples_of
from nanorlhf.config import arg, die, from_cli
from nanorlhf.data import world
from nanorlhf.data.files import write_records
from nanorlhf.human.doubt import most_doubtful_first, scores_of
from nanorlhf.human.questions import read_questions
from nanorlhf.report import right_pairs, share
from nanorlhf.run import checkpoint

MODELS = {"random": 1, "margin": 1, "committee": 3}


@dataclass
class Config(LabConfig):
    """Random pairs against those that a reward model is unsure about."""

    sft: str = arg("out/sft", "whose responses are judged, and what the reward model starts from")
    seeds: list[int] = arg([1, 2, 3, 4, 5], "of the choice of pairs, of labelers and training")
    at_once: int = arg(100, "pairs chosen at a time")
    rounds: int = arg(6, "times that they are chosen")
    prompts: int = arg(1000, "prompts, with two pairs of responses each, to choose from")


def main(cfg):
    if cfg.quick:
        cfg.seeds, cfg.at_once, cfg.rounds, cfg.prompts = [1], 20, 2, 60
    columns, flags = "seed chosen_by sft_weights judgements accuracy", "at_once rounds prompts"
    lab = Lab(cfg, "uncertain", columns, flags, picture=False)
    if not (found := checkpoint.find(cfg.sft)):
        die(f"--sft {cfg.sft}: no checkpoint there")
    weights = digest(Path(found, "weights.pt").read_bytes())
    keys = [{"seed": s, "chosen_by": arm} for arm in MODELS for s in cfg.seeds]
    table(lab.each(grow, [key | {"sft_weights": weights} for key in keys]))


def pairs(lab, seed, part, weights):
    """Questions about two responses, sampled once for all arms."""
    cfg, path = lab.cfg, lab.folder / f"{part}_{seed}_{lab.cfg.prompts}_{weights}.jsonl"
    with alone(path):
        if not path.exists():
            n, seed = (cfg.prompts, seed) if part == "pool" else (cfg.prompts // 2, seed + 1000)
            write_records(path, samples_of(cfg.sft, n, 4, seed))
    found = read_questions(path, "comparisons")
    if part == "pool" and len(found) < cfg.rounds * cfg.at_once:
        die(f"--prompts {cfg.prompts}: {len(found)} pairs, too few to choose from")
    return found


def grow(lab, seed, chosen_by, sft_weights):
    """Judge, learn, choose, and again; a row for each round."""
    pool, test = (pairs(lab, seed, part, sft_weights) for part in ("pool", "test"))
    rng = random.Random(f"uncertain/{seed}")
    waiting = rng.sample(pool, len(pool))  # the same first pairs for every arm
    judged, folders, rows = [], [], []
    for _ in range(lab.cfg.rounds):
        if folders and chosen_by != "random":
            about = {"feedback": "comparisons", "device": "cpu", "dtype": "auto", "reward": folders}
            waiting = most_doubtful_first(SimpleNamespace(**about), waiting)
        judged += [judgement(seed, question) for question in waiting[: lab.cfg.at_once]]
        waiting = waiting[lab.cfg.at_once :]
        folders = [learn(lab, seed, chosen_by, judged, k) for k in range(MODELS[chosen_by])]
        rows.append({"judgements": len(judged), "accuracy": against_gold(folders[0], test)})
    return rows


def judgement(seed, question):
    """What a labeler of the panel says, the same in every arm."""
    rng = random.Random(f"{seed}/{question.key}")
    prompt, texts = question.asked["prompt"], list(question.responses)
    ranks = world.rank(rng, rng.choice(world.TRAIN_LABELERS), prompt, texts)
    return {"prompt": prompt, "completions": texts, "ranks": ranks}


def learn(lab, seed, arm, judged, k):
    """The folder of a reward model; the k-th of a committee has another head and order of data."""
    folder = lab.folder / f"rm_{seed}_{arm}_{k}"
    files = [write_records(lab.folder / f"judged_{seed}_{arm}.jsonl", judged)]
    flags = {"epochs": 4, "learning_rate": 2e-3, "warmup_steps": 5, "max_new_tokens": 1}
    about = {"out_dir": str(folder), "init": lab.cfg.sft, "data": files, "seed": seed + 100 * k}
    with redirect_stdout(StringIO()):
        train_rm.main(train_rm.Config(**about, **flags, check=False))
    return str(folder)


def against_gold(folder, questions):
    about = SimpleNamespace(device="cpu", dtype="auto")
    pairs = [(q.turns, text) for q in questions for text in q.responses]
    scores = scores_of(about, folder, pairs).view(-1, 2).tolist()
    right = []
    for question, pair in zip(questions, scores):
        golds = [world.gold(question.asked["prompt"], text) for text in question.responses]
        right += right_pairs(pair, golds)
    return share(right)[0]


def table(rows):
    """Accuracy by the number of judgements: mean and sd over seeds."""
    for n in sorted({int(row["judgements"]) for row in rows}):
        for arm in MODELS:
            mine = [row for row in rows if row["chosen_by"] == arm and row["judgements"] == str(n)]
            found = [float(row["accuracy"]) for row in mine]
            spread = f" +- {stdev(found):.3f}" if len(found) > 1 else ""
            print(f"{n:5} {arm:10} {mean(found):.3f}{spread} ({len(found)} seeds)")


if __name__ == "__main__":
    main(from_cli(Config))
