"""What the experiments share: rows that stay once they are there, and models made once for all.

A row says which run it is of (its key and flags), what came out, on what kind of device, and the
digest of the source that decides it: of the stages, of the forks that experiments run, and of the
commands that sample and measure. A fork of yours is not in the digest, and neither is the file of
an experiment itself: after a change to what it measures, move its results.csv away. A row that is
there, with equal key, flags and digest, is not run again: an evening can be cut into pieces.
"""

import csv
import hashlib
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib import import_module
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import train_gpt
import train_ppo
import train_rm
import train_sft
from nanorlhf import generate, judging, load, picture, score
from nanorlhf.config import arg, die, doing, note
from nanorlhf.data import dialogue, world
from nanorlhf.machine import durable
from nanorlhf.run.metrics import read_rows
from nanorlhf.run.session import fingerprints
from nanorlhf.sampling import sample_responses

ROOT = Path(__file__).parents[1]
DECIDING = """nanorlhf/**/*.py train_gpt.py train_sft.py train_rm.py train_ppo.py
experiments/train_dpo.py experiments/train_lora.py experiments/train_rft.py
experiments/train_rloo.py experiments/peer_trl.py""".split()
BESIDE = ("tools", "human", "course")  # rooms that decide nothing, but for evaluate.py


@dataclass
class LabConfig:
    """The flags that all experiments share."""

    QUICK = {}  # what --quick makes of the other flags
    out: str = arg("out/experiments", "folder of all experiments")
    seeds: list[int] = arg([1, 2, 3], "each a world's models of its own")
    jobs: int = arg(1, "runs at a time, each a process with one thread")
    quick: bool = arg(False, "minutes: few steps where you name none, numbers without meaning")


class Lab:
    """An experiment: its flags, its folder, and the results.csv in there. The flags named in
    `flags` decide what comes out of all its rows, and are kept in them."""

    def __init__(self, cfg, name, columns, flags):
        picture.pyplot()  # where matplotlib is missing this ends here, and not after all runs
        for flag, usual in vars(type(cfg)()).items():
            if getattr(cfg, flag) == usual and cfg.quick:
                setattr(cfg, flag, cfg.QUICK.get(flag, usual))
            if usual and getattr(cfg, flag) == []:
                die(f"--{flag}: needs at least one")
            if isinstance(usual, list):  # each once
                setattr(cfg, flag, list(dict.fromkeys(getattr(cfg, flag))))
        self.cfg, self.folder = cfg, Path(cfg.out, name + "-quick" * cfg.quick)
        self.path = self.folder / "results.csv"
        settings = ", ".join(f"{flag} {getattr(cfg, flag)}" for flag in flags.split())
        self.made_by = {"flags": settings, "source": source()}
        self.columns = [*columns.split(), *self.made_by, "device"]
        header = ",".join(self.columns) + "\n"
        if not self.path.exists():
            durable.write_text(self.path, header)
        if self.path.open().readline() != header:
            die(f"{self.path}: made by another version of this experiment; move it away")

    def each(self, measure, keys):
        """The rows of all keys, --jobs of which are worked on at a time. Where a key has none yet,
        they are made by measure(self, **key), a list of dicts, and kept at once."""
        lacking, keep = [key for key in keys if not self.rows(key)], partial(self.keep, measure)
        if lacking:
            models = "; the first waits for the models that all share" if self.cfg.quick else ""
            doing(f"{self.path}: {len(lacking)} of {len(keys)} are to be made{models}")
        if self.cfg.jobs == 1:
            self.tell(lacking, map(keep, lacking))
        elif lacking:
            os.environ["OMP_NUM_THREADS"] = "1"  # read by the processes, which start afresh
            with ProcessPoolExecutor(self.cfg.jobs, get_context("spawn")) as pool:
                self.tell(lacking, pool.map(keep, lacking))  # begins none once one has failed
        return [row for key in keys for row in self.rows(key)]

    def tell(self, keys, made):
        """Say of each key, as it is made, that it is done, and how long the others may take."""
        start = time.perf_counter()
        for n, (key, _) in enumerate(zip(keys, made), 1):
            seconds = time.perf_counter() - start
            spent, left = map(tqdm.format_interval, (seconds, seconds / n * (len(keys) - n)))
            what = ", ".join(f"{name} {value}" for name, value in key.items())
            note(f"{what}: done, {n} of {len(keys)} in {spent}, {left} left")

    def rows(self, key):
        """The rows of a key that today's source has made, as dicts of texts."""
        wanted = {name: str(value) for name, value in (key | self.made_by).items()}
        table = csv.DictReader(self.path.read_text().splitlines())
        return [row for row in table if wanted.items() <= row.items()]

    def keep(self, measure, key):
        """Make a key's rows and write them, all or none."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        more, text = key | self.made_by | {"device": device}, StringIO()
        to = csv.DictWriter(text, self.columns, extrasaction="ignore", lineterminator="\n")
        to.writerows(row | more for row in measure(self, **key))
        with alone(self.path):
            if not self.rows(key):  # no other process was faster
                durable.write_text(self.path, self.path.read_text() + text.getvalue())

    def save(self, figure, title):
        """Write the experiment's picture. The title says what is drawn over the seeds."""
        figure.suptitle(f"{title}, over {self.named(self.cfg.seeds)}")
        picture.save(figure, str(self.folder / f"{self.folder.name.removesuffix('-quick')}.png"))

    @staticmethod
    def named(seeds):
        """`seeds 1 to 3`, for a caption."""
        first, *others = seeds
        if len(others) > 1 and seeds == list(range(first, first + len(seeds))):
            return f"seeds {first} to {seeds[-1]}"
        return f"seed{'s' * bool(others)} {', '.join(map(str, seeds))}"


@contextmanager
def alone(path):
    """Inside, no other process works on a path: it waits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as file:
        durable.hold(file, path)
        yield


@cache
def source():
    """A digest of the source that decides what comes out of a run."""
    paths = sorted(path for pattern in DECIDING for path in ROOT.glob(pattern))
    kept = [p for p in paths if p.parent.name not in BESIDE or p.name == "evaluate.py"]
    return hashlib.sha256(b"".join(path.read_bytes() for path in kept)).hexdigest()[:12]


def quietly(cfg, **more):
    """The folder of the finished run that a script's Config describes, which is made unless it is
    there with equal flags, source, and contents of the data and models it reads. What it prints is
    in printed.txt there. `more` is for the script's main, and cfg.out_dir has to tell one such from
    another. Another process that needs the same run waits for it."""
    made_by = f"{source()} {asdict(cfg)} {fingerprints(cfg)}"
    mark = Path(cfg.out_dir, "finished")  # what it was made by, and seconds
    with alone(mark):
        if not (mark.exists() and mark.read_text().startswith(made_by)):
            start = time.perf_counter()
            doing(f"{type(cfg).__module__} into {cfg.out_dir}")
            mark.unlink(missing_ok=True)  # what is there is half of another run from now on
            with mark.with_name("printed.txt").open("w") as file, redirect_stdout(file):
                try:
                    import_module(type(cfg).__module__).main(cfg, **more)
                finally:
                    durable.unlock(cfg.out_dir)
            mark.write_text(f"{made_by} {time.perf_counter() - start:.1f}")
    return cfg.out_dir


def folder_of(cfg, seed, size="medium"):
    """Where models are that all experiments share, one seed's and size's; medium is the demo's."""
    return f"{cfg.out}/models{'-quick' * cfg.quick}/{seed}_{size}"


def sft_of(cfg, seed, size="medium", rate=1.0, **flags):
    """(GPT, SFT): folders of models that all experiments share, with the demo's settings but for
    the GPT's `flags` and, for other sizes, learning rates that are `rate` times the demo's."""
    out, few = folder_of(cfg, seed, size), {"demonstrations": 1000} if cfg.quick else {}
    flags |= {"max_steps": 150, "documents": 2000} if cfg.quick else {}
    flags["learning_rate"] = 6e-3 * rate
    gpt = quietly(train_gpt.Config(f"{out}/gpt", seed, **flags))
    sft = train_sft.Config(f"{out}/sft", seed, learning_rate=3e-3 * rate, init=gpt, **few)
    return gpt, quietly(sft)


def models_of(cfg, seed, size="medium", rate=1.0, **flags):
    """(GPT, SFT, reward model), the first two as `sft_of` makes them."""
    gpt, sft = sft_of(cfg, seed, size, rate, **flags)
    flags = {"learning_rate": 5e-4 * rate} | ({"prompts": 60} if cfg.quick else {})
    return gpt, sft, rm_of(cfg, f"{folder_of(cfg, seed, size)}/rm", seed, init=sft, **flags)


def rm_of(cfg, to, seed, **flags):
    """The folder of a reward model."""
    flags |= {"heldout_prompts": 20} if cfg.quick else {}
    return quietly(train_rm.Config(to, seed, **flags))


def ppo_of(cfg, to, seed, sft, reward, estimate=train_ppo.ppo_advantages, **flags):
    """The folder of a run of PPO over cfg.steps iterations, which keeps its last policy."""
    flags |= {"init": sft, "reward": reward, "max_steps": cfg.steps, "save_every": cfg.steps}
    return quietly(train_ppo.Config(to, seed, **flags), estimate=estimate)


def curve_of(run):
    """Rows of step, KL from the reference, proxy and gold of a PPO run's evaluations."""
    rows = [row for row in read_rows(Path(run, "metrics.csv"))[1] if "eval_gold" in row]
    columns = {"step": "step", "kl": "eval_kl_exact", "proxy": "eval_scores", "gold": "eval_gold"}
    return [{name: row[column] for name, column in columns.items()} for row in rows]


def judged(model, sft, seed, n, limit=128):
    """What a model's answers to n held-out prompts are worth: gold, win rate against SFT's answers
    as the training labelers judge, KL from SFT in nats and length in tokens, both of what was
    sampled, at most `limit` tokens; and the minutes that `quietly` took to train it."""
    (gpt, tokenizer), (reference, _) = load(model), load(sft)
    prompts, mark = world.prompts("held_out", n, f"judged/{seed}"), Path(model, "finished")
    seconds = mark.read_text().split()[-1] if mark.exists() else "nan"
    room = dialogue.room_for_prompts(limit, gpt.config.block_size)
    prompt_ids = [dialogue.encode_prompt(tokenizer, [("user", p)])[-room:] for p in prompts]
    answers = lambda m: sample_responses(m, tokenizer, prompt_ids, limit, seed)
    ids, other_ids = answers(gpt), answers(reference)
    texts, others = ([tokenizer.decode(row) for row in rows] for rows in (ids, other_ids))
    return {
        "minutes": round(float(seconds) / 60, 2),
        "gold": sum(map(world.gold, prompts, texts)) / n,
        "win": judging.preferred(prompts, texts, others, world.TRAIN_LABELERS, seed),
        "kl": judging.mean_kl(gpt, reference, tokenizer, prompt_ids, ids),
        "length": sum(map(len, ids)) / n,
    }


def best_of_n(sft, reward, prompts, N, seed):
    """Rows of n (as `step`), KL, proxy and gold of the best of n by proxy, each the mean over all
    subsets of n of a prompt's N responses. KL is its upper bound, arXiv:2401.01879."""
    texts = generate(*load(sft), [p for p in prompts for _ in range(N)], seed=seed)
    answers = [(p, texts[i * N : (i + 1) * N]) for i, p in enumerate(prompts)]
    gold = [[world.gold(prompt, text) for text in group] for prompt, group in answers]
    model, tokenizer = load(reward)
    proxy = [score(model, tokenizer, [prompt] * N, group) for prompt, group in answers]
    order, rows = np.argsort(proxy, 1), []
    proxy, gold = (np.take_along_axis(np.array(x), order, 1) for x in (proxy, gold))
    for n in (2**i for i in range(N.bit_length())):
        # the i-th lowest is the best of comb(i - 1, n - 1) subsets
        weight = [math.comb(i, n - 1) / math.comb(N, n) for i in range(N)]
        means = {"proxy": (proxy @ weight).mean(), "gold": (gold @ weight).mean()}
        rows.append({"step": n, "kl": math.log(n) - (n - 1) / n} | means)
    return rows


def numbers(rows, column, **key):
    """The numbers in a column of the rows that have a key, in their order; a blank cell is nan."""
    key = {name: str(value) for name, value in key.items()}
    return np.array([float(r[column] or "nan") for r in rows if key.items() <= r.items()])


def spread(ax, x, values, **look):
    """The means of values (x, seeds) with their intervals, and each seed as a cross."""
    means, halves = zip(*map(interval, values))
    bars = ax.errorbar(x, means, halves, capsize=3, **look)
    ax.plot(x, values, "x", color=bars[0].get_color(), ms=5)


class Interval(NamedTuple):
    """A mean over seeds, and half of its interval: nan for one seed, which has none."""

    mean: float
    half: float

    def __format__(self, spec):
        half = "" if math.isnan(self.half) else f" +- {self.half:{spec.strip('+')}}"
        return f"{self.mean:{spec}}{half}"


def interval(values):
    """The Interval of 95 % of a mean over few seeds, by Student's t."""
    n, mean = len(values), sum(values) / len(values)
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
    beyond = 1.96 + 2.4 / max(n - 1, 1) + 2.8 / max(n - 1, 1) ** 2  # within 0.01 of Student's
    sd = math.sqrt(sum((v - mean) ** 2 for v in values) / max(n - 1, 1))
    return Interval(mean, t.get(n, beyond) * sd / math.sqrt(n) if n > 1 else math.nan)
