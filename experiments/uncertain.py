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
from experiments.lab import Lab, samples_of
from nanorlhf.config import arg, die, from_cli
from nanorlhf.data import world
from nanorlhf.data.examples import write_records
from nanorlhf.human.doubt import most_doubtful_first, scores_of
from nanorlhf.human.questions import read_questions
from nanorlhf.report import right_pairs, share

MODELS = {"random": 1, "margin": 1, "committee": 3}


@dataclass
class Config:
    """Random pairs against those that a reward model is unsure about."""

    sft: str = arg("out/sft", "whose responses are judged, and what the reward model starts from")
    out_dir: str = arg("out/experiments/uncertain", "folder for results.csv and all else")
    seeds: list[int] = arg([1, 2, 3, 4, 5], "one row of each kind for each")
    at_once: int = arg(100, "pairs chosen at a time")
    rounds: int = arg(6, "times that they are chosen")
    prompts: int = arg(1000, "prompts, with two pairs of responses each, to choose from")
    quick: bool = arg(False, "a minute: one seed, few pairs")


def main(cfg):
    if cfg.quick:
        cfg.seeds, cfg.at_once, cfg.rounds, cfg.prompts = [1], 20, 2, 60
        cfg.out_dir += "-quick"
    columns = "seed chosen_by at_once rounds judgements accuracy".split()
    lab, rows = Lab(cfg.out_dir, columns), []
    for seed in cfg.seeds:
        pool, test = (pairs(cfg, seed, part) for part in ("pool", "test"))
        if len(pool) < cfg.rounds * cfg.at_once:
            die(f"--prompts {cfg.prompts}: {len(pool)} pairs, too few to choose from")
        for arm in MODELS:
            key = {"seed": seed, "chosen_by": arm, "at_once": cfg.at_once, "rounds": cfg.rounds}
            rows += lab.run(key, lambda: grow(cfg, seed, arm, pool, test))
    table(rows)


def pairs(cfg, seed, part):
    """Questions about two responses, sampled once for all arms."""
    path = Path(cfg.out_dir, f"{part}_{seed}.jsonl")
    if not path.exists():
        n, seed = (cfg.prompts, seed) if part == "pool" else (cfg.prompts // 2, seed + 1000)
        write_records(path, samples_of(cfg.sft, n, 4, seed))
    return read_questions(path, "comparisons")


def grow(cfg, seed, arm, pool, test):
    """Judge, learn, choose, and again; a row for each round."""
    rng = random.Random(f"uncertain/{seed}")
    waiting = rng.sample(pool, len(pool))  # the same first pairs for every arm
    judged, folders, rows = [], [], []
    for _ in range(cfg.rounds):
        if folders and arm != "random":
            about = {"feedback": "comparisons", "device": "cpu", "dtype": "auto", "reward": folders}
            waiting = most_doubtful_first(SimpleNamespace(**about), waiting)
        judged += [judgement(seed, question) for question in waiting[: cfg.at_once]]
        waiting = waiting[cfg.at_once :]
        folders = [learn(cfg, seed, arm, judged, k) for k in range(MODELS[arm])]
        rows.append({"judgements": len(judged), "accuracy": against_gold(folders[0], test)})
    return rows


def judgement(seed, question):
    """What a labeler of the panel says, the same in every arm."""
    rng = random.Random(f"{seed}/{question.key}")
    prompt, texts = question.asked["prompt"], list(question.responses)
    ranks = world.rank(rng, rng.choice(world.TRAIN_LABELERS), prompt, texts)
    return {"prompt": prompt, "completions": texts, "ranks": ranks}


def learn(cfg, seed, arm, judged, k):
    """The folder of a reward model; the k-th of a committee has another head and order of data."""
    folder = Path(cfg.out_dir, "rm", f"{arm}_{k}")
    files = [write_records(Path(cfg.out_dir, "judged.jsonl"), judged)]
    flags = {"epochs": 4, "learning_rate": 2e-3, "warmup_steps": 5, "max_new_tokens": 1}
    about = {"out_dir": str(folder), "init": cfg.sft, "data": files, "seed": seed + 100 * k}
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
