"""What the experiments share: rows that stay once they are there, and models made once for all.

A row says which run it is of (its key), what came out, and the digest of the stages' source. A row
that is there, with equal key and digest, is not run again: an evening can be cut into pieces.
"""

import csv
import hashlib
import math
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path

import numpy as np

import train_gpt
import train_sft
from nanorlhf import load, score
from nanorlhf.data import world
from nanorlhf.run import checkpoint
from nanorlhf.tools import sample

ROOT = Path(__file__).parents[1]
BESIDE = ("tools", "human", "measure")  # rooms that no number of a run depends on


class Lab:
    """The folder of an experiment with its results.csv."""

    def __init__(self, folder, columns):
        self.folder, self.path = Path(folder), Path(folder, "results.csv")
        self.columns = [*columns, "source"]
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            self.path.write_text(",".join(self.columns) + "\n")

    def rows(self, key):
        """The rows of a key that today's source has made, as dicts of texts."""
        wanted = {name: str(value) for name, value in key.items()} | {"source": source()}
        with self.path.open() as file:
            return [row for row in csv.DictReader(file) if wanted.items() <= row.items()]

    def run(self, key, results):
        """The rows of a key: those that are there or, where there are none, results(), a list of
        dicts, which are kept at once."""
        if found := self.rows(key):
            return found
        made = [key | result | {"source": source()} for result in results()]
        with self.path.open("a") as file:
            csv.DictWriter(file, self.columns).writerows(made)
        print(", ".join(f"{name} {value}" for name, value in key.items()), "done", flush=True)
        return self.rows(key)


@cache
def source():
    """A digest of the stages' source."""
    files = [*ROOT.glob("train_*.py"), *ROOT.glob("nanorlhf/**/*.py")]
    kept = sorted(p for p in files if p.relative_to(ROOT).parts[1:2] not in [(b,) for b in BESIDE])
    text = b"".join(p.read_bytes() for p in kept)
    return hashlib.sha256(text).hexdigest()[:12]


def quietly(stage, cfg, **more):
    """The folder of a stage's finished run, which is made unless it is there; prints nothing. What
    is in `more` is for its main."""
    mark = Path(cfg.out_dir, "finished")
    if not (mark.exists() and mark.read_text() == source() and checkpoint.find(cfg.out_dir)):
        with redirect_stdout(StringIO()):
            stage.main(cfg, **more)
        mark.write_text(source())
    return cfg.out_dir


def sft_of(folder, seed, quick, **sizes):
    """(GPT, SFT): folders of models that all experiments share, with the demo's settings."""
    at = lambda stage: f"{folder}/models{'-quick' if quick else ''}/{seed}/{stage}"
    few = {"max_steps": 150, "documents": 2000} if quick else {}
    gpt = quietly(train_gpt, train_gpt.Config(out_dir=at("gpt"), seed=seed, **few, **sizes))
    few = {"demonstrations": 1000} if quick else {}
    return gpt, quietly(train_sft, train_sft.Config(out_dir=at("sft"), init=gpt, seed=seed, **few))


def curve_of(run):
    """Rows of step, KL from the reference, proxy and gold of a PPO run's evaluations."""
    with Path(run, "metrics.csv").open() as file:
        found = [row for row in csv.DictReader(file) if row["eval_gold"]]
    names = {"kl": "eval_kl_exact", "proxy": "eval_scores", "gold": "eval_gold"}
    return [{"step": row["step"]} | {k: row[name] for k, name in names.items()} for row in found]


def samples_of(model, prompts, n, seed):
    """Records of held-out and other prompts of the world, each with n responses."""
    about = sample.Config(models=[model], prompts=prompts, responses=n, seed=seed)
    return sample.sampled(about)


def best_of_n(reward, answers):
    """Rows of n (as `step`), KL, proxy and gold of the best of n by proxy, each the mean over all
    subsets of n of a prompt's responses. KL is its upper bound, arXiv:2401.01879."""
    model, tokenizer = load(reward)
    proxy, gold = [], []
    for row in answers:
        prompt, texts = row["prompt"], row["responses"]
        proxy.append(score(model, tokenizer, [prompt] * len(texts), texts))
        gold.append([world.gold(prompt, text) for text in texts])
    order, N = np.argsort(proxy, 1), len(proxy[0])
    proxy, gold = (np.take_along_axis(np.array(x), order, 1) for x in (proxy, gold))
    found, n = [], 1
    while n <= N:  # the i-th lowest is the best of comb(i - 1, n - 1) subsets
        weight = [math.comb(i, n - 1) / math.comb(N, n) for i in range(N)]
        means = {"proxy": (proxy @ weight).mean(), "gold": (gold @ weight).mean()}
        found.append({"step": n, "kl": math.log(n) - (n - 1) / n} | means)
        n *= 2
    return found


def interval(values):
    """(mean, half of the 95 % interval of a mean over few seeds), by Student's t."""
    n, mean = len(values), sum(values) / len(values)
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
    sd = math.sqrt(sum((v - mean) ** 2 for v in values) / max(n - 1, 1))
    return mean, t.get(n, 2.0) * sd / math.sqrt(n) if n > 1 else math.nan
