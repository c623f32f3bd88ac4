"""What the experiments share: rows that stay once they are there, and models made once for all.

A row says which run it is of (its key and flags), what came out, on what kind of device, and the
digest of the source that decides it: of the stages, of the forks in experiments/, and of the
commands that sample and measure. The file of an experiment itself is not in the digest: after a
change to what it measures, move its results.csv away. A row that is there, with equal key, flags
and digest, is not run again: an evening can be cut into pieces.
"""

import csv
import hashlib
import math
import os
import random
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from functools import cache
from io import StringIO
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

import train_gpt
import train_rm
import train_sft
from nanorlhf import generate, load, score
from nanorlhf.config import arg, die, note, reason
from nanorlhf.data import dialogue, world
from nanorlhf.machine import process
from nanorlhf.tools import evaluate, plot, sample

ROOT = Path(__file__).parents[1]
DECIDING = "train_*.py nanorlhf/**/*.py experiments/train_*.py experiments/peer_*.py".split()
# and of this room, which is beside the stages, nothing but what is named
BESIDE = {"tools": ("evaluate.py", "sample.py", "export.py")}


@dataclass
class LabConfig:
    """The flags that all experiments share."""

    out: str = arg("out/experiments", "folder of all experiments")
    seeds: list[int] = arg([1, 2, 3], "each a world's models of its own")
    jobs: int = arg(1, "runs at a time, each a process with one thread")
    quick: bool = arg(False, "a minute or two: one seed, few steps, numbers without meaning")


class Lab:
    """An experiment: its flags, its folder, and the results.csv in there. The flags named in
    `flags` decide what comes out of all its rows, and are kept in them."""

    def __init__(self, cfg, name, columns, flags, picture=True):
        if picture:
            plot.pyplot()  # where matplotlib is missing this ends here, and not after all runs
        for flag, usual in vars(type(cfg)()).items():
            if usual and getattr(cfg, flag) == []:
                die(f"--{flag}: needs at least one")
        cfg.seeds = list(dict.fromkeys(cfg.seeds))
        self.cfg, self.folder = cfg, Path(cfg.out, name + "-quick" * cfg.quick)
        self.path = self.folder / "results.csv"
        settings = ", ".join(f"{flag} {getattr(cfg, flag)}" for flag in flags.split())
        self.about = {"flags": settings, "source": source()}
        self.columns = [*columns.split(), *self.about, "device"]
        header = ",".join(self.columns) + "\n"
        try:
            with alone(self.path):
                if not self.path.exists():
                    self.path.write_text(header)
            found = self.path.open().readline()
        except OSError as error:
            die(f"--out {cfg.out}: {reason(error)}")
        if found != header:
            die(f"{self.path}: made by another version of this experiment; move it away")

    def each(self, measure, keys):
        """The rows of all keys, --jobs of which are worked on at a time. Where a key has none yet,
        they are made by measure(self, **key), a list of dicts, and kept at once."""
        lacking = [key for key in keys if not self.rows(key)]
        if self.cfg.jobs == 1:
            for key in lacking:
                self.keep(measure, key)
        elif lacking:
            os.environ["OMP_NUM_THREADS"] = "1"  # read by the processes, which start afresh
            with ProcessPoolExecutor(self.cfg.jobs, mp_context=get_context("spawn")) as pool:
                runs = [pool.submit(self.keep, measure, key) for key in lacking]
                try:
                    for run in as_completed(runs):
                        run.result()
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)  # begin no further run
                    raise
        found = [row for key in keys for row in self.rows(key)]
        if len({row["device"] for row in found}) > 1:
            note(f"{self.path}: some of these rows were made on a GPU and some on a CPU")
        return found

    def rows(self, key):
        """The rows of a key that today's source has made, as dicts of texts."""
        wanted = {name: str(value) for name, value in (key | self.about).items()}
        with self.path.open() as file:
            return [row for row in csv.DictReader(file) if wanted.items() <= row.items()]

    def keep(self, measure, key):
        about = key | self.about | {"device": "cuda" if torch.cuda.is_available() else "cpu"}
        made, text = [result | about for result in measure(self, **key)], StringIO()
        to = csv.DictWriter(text, self.columns, extrasaction="ignore", lineterminator="\n")
        to.writerows(made)
        with alone(self.path):
            if self.rows(key):
                return  # another process was faster
            size = self.path.stat().st_size
            try:
                with self.path.open("a") as file:
                    file.write(text.getvalue())
            except OSError as error:
                os.truncate(self.path, size)  # all rows of a key or none
                die(f"{self.path}: {reason(error)}")
        print(", ".join(f"{name} {value}" for name, value in key.items()), "done", flush=True)


@contextmanager
def alone(path):
    """Inside, no other process works on a path: it waits."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as file:
        process.hold(file, path)
        yield


@cache
def source():
    """A digest of the source that decides what comes out of a run."""
    paths = sorted({path for pattern in DECIDING for path in ROOT.glob(pattern)})
    rooms = [(*path.relative_to(ROOT).parts, "")[1] for path in paths]
    kept = [p for p, room in zip(paths, rooms) if p.name in BESIDE.get(room, (p.name,))]
    return digest(b"".join(path.read_bytes() for path in kept))


def digest(data):
    return hashlib.sha256(data).hexdigest()[:12]


def quietly(stage, cfg, **more):
    """The folder of a stage's finished run, which is made unless it is there with equal flags and
    source. What it prints is in printed.txt there. `more` is for its main, and cfg.out_dir has to
    tell one such from another. Another process that needs the same run waits for it."""
    folder, text = Path(cfg.out_dir), StringIO()
    made_by = f"{source()} {digest(repr(asdict(cfg)).encode())}"
    mark = folder / "finished"  # source, flags and seconds
    with alone(folder):
        if not (mark.exists() and mark.read_text().startswith(made_by)):
            start = time.perf_counter()
            with redirect_stdout(text):
                stage.main(cfg, **more)
            (folder / "printed.txt").write_text(text.getvalue())
            mark.write_text(f"{made_by} {time.perf_counter() - start:.1f}")
    return cfg.out_dir


def folder_of(cfg, seed, size=""):
    """Where models are that all experiments share, one seed's and size's."""
    return f"{cfg.out}/models{'-quick' * cfg.quick}/{seed}{size}"


def sft_of(cfg, seed, size="", rate=1.0, **sizes):
    """(GPT, SFT): folders of models that all experiments share, with the demo's settings but for
    other sizes, whose learning rates are `rate` times the demo's."""
    at = lambda stage: f"{folder_of(cfg, seed, size)}/{stage}"
    about = {"out_dir": at("gpt"), "seed": seed, "learning_rate": 6e-3 * rate}
    few = {"max_steps": 150, "documents": 2000} if cfg.quick else {}
    gpt = quietly(train_gpt, train_gpt.Config(**about | sizes | few))
    about = {"out_dir": at("sft"), "seed": seed, "learning_rate": 3e-3 * rate, "init": gpt}
    few = {"demonstrations": 1000} if cfg.quick else {}
    return gpt, quietly(train_sft, train_sft.Config(**about | few))


def reward_of(cfg, sft, seed, rate=1.0):
    """The folder of the reward model beside an SFT model, with the demo's settings."""
    about = {"out_dir": str(Path(sft).parent / "rm"), "seed": seed, "init": sft}
    few = {"prompts": 60, "heldout_prompts": 20} if cfg.quick else {}
    return quietly(train_rm, train_rm.Config(**about | few, learning_rate=5e-4 * rate))


def models_of(cfg, seed):
    """(SFT, reward model) of a seed, with the demo's settings."""
    sft = sft_of(cfg, seed)[1]
    return sft, reward_of(cfg, sft, seed)


def curve_of(run):
    """Rows of step, KL from the reference, proxy and gold of a PPO run's evaluations."""
    with Path(run, "metrics.csv").open() as file:
        found = [row for row in csv.DictReader(file) if row["eval_gold"]]
    names = {"kl": "eval_kl_exact", "proxy": "eval_scores", "gold": "eval_gold"}
    return [{"step": row["step"]} | {k: row[name] for k, name in names.items()} for row in found]


def preferred(prompts, texts, others, panel, seed):
    """The share of prompts to which a labeler, drawn from the panel for each, prefers the first
    text; equal texts count as half."""
    rng, wins = random.Random(f"preferred/{seed}"), 0.0
    for prompt, *pair in zip(prompts, texts, others, strict=True):
        mine, theirs = world.rank(rng, rng.choice(panel), prompt, pair)
        wins += 0.5 + 0.5 * (theirs - mine)
    return wins / len(prompts)


def judged(model, sft, seed, n):
    """What a model's answers to n held-out prompts are worth: gold, win rate against SFT's answers
    as the training labelers judge, KL from SFT in nats, length in tokens; and the minutes that
    `quietly` took to train it."""
    (gpt, tokenizer), (reference, _) = load(model), load(sft)
    prompts = world.prompts("held_out", n, f"judged/{seed}")
    texts, others = (generate(m, tokenizer, prompts, seed=seed) for m in (gpt, reference))
    chat = [dialogue.encode_prompt(tokenizer, [("user", p)]) for p in prompts]
    ids = [tokenizer.encode(text) + [tokenizer.eos_id] for text in texts]
    mark = Path(model, "finished")
    seconds = mark.read_text().split()[-1] if mark.exists() else "nan"
    return {
        "minutes": round(float(seconds) / 60, 2),
        "gold": sum(map(world.gold, prompts, texts)) / n,
        "win": preferred(prompts, texts, others, world.TRAIN_LABELERS, seed),
        "kl": evaluate.mean_kl(gpt, reference, tokenizer, chat, ids),
        "length": sum(map(len, ids)) / n,
    }


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
    beyond = 1.96 + 2.4 / max(n - 1, 1) + 2.8 / max(n - 1, 1) ** 2  # within 0.01 of Student's
    sd = math.sqrt(sum((v - mean) ** 2 for v in values) / max(n - 1, 1))
    return mean, t.get(n, beyond) * sd / math.sqrt(n) if n > 1 else math.nan
