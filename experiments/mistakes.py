"""What do famous mistakes look like in a run? Each of `--mistake`, beside the healthy run.

    python -m experiments.mistakes              # 3 seeds, 24 iterations of PPO each
    python -m experiments.mistakes --quick

A broken stage starts from the healthy one before it. Where PPO comes after it, PPO starts from what
came out: its first evaluation shows what became of the SFT model, its last of the reward model. A
broken run is a process of its own, as the mistake stays in the process that it is put into.
"""

import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import train_gpt
import train_ppo
import train_rm
import train_sft
from experiments.lab import ROOT, Lab, LabConfig, models_of, numbers, quietly
from nanorlhf.config import arg, from_cli
from nanorlhf.course.mistakes import OF_STAGE, SHOWN
from nanorlhf.run.metrics import read_rows


@dataclass
class Config(LabConfig):
    """The metrics of runs that are broken on purpose, beside a healthy run's."""

    steps: int = arg(24, "iterations of PPO")


def main(cfg):
    n_each = None
    if cfg.quick:
        cfg.seeds, cfg.steps, n_each = [1], 2, 1
    lab = Lab(cfg, "mistakes", "seed stage mistake metric first last", "steps")
    names = {s: ["", *(m.__name__ for m in of[:n_each])] for s, of in OF_STAGE.items()}
    arms = [{"stage": stage, "mistake": name} for stage in names for name in names[stage]]
    rows = lab.each(measured, [arm | {"seed": seed} for arm in arms for seed in cfg.seeds])
    for arm in arms:
        print(f"\n{arm['stage']}: {arm['mistake'] or 'healthy'}")
        for metric in SHOWN.split():
            if any(row["metric"] == metric and arm.items() <= row.items() for row in rows):
                first, last = (numbers(rows, x, metric=metric, **arm) for x in ("first", "last"))
                print(f"  {metric:18} {first.mean():8.3f} -> {last.mean():8.3f}  seeds {last}")


def measured(lab, stage, mistake, seed):
    """The first and last value of each metric, of the stage and of PPO after it."""
    gpt, sft, rm = models_of(lab.cfg, seed)
    to = f"{lab.folder}/{seed}_{stage}_{mistake or 'healthy'}"
    flags = {"seed": seed, "mistake": mistake, "out_dir": f"{to}/{stage}"}
    few = {"max_steps": 20} if lab.cfg.quick else {}
    ppo = {"max_steps": lab.cfg.steps, "eval_every": lab.cfg.steps, "out_dir": f"{to}/ppo"}
    runs = []
    if stage == "gpt":
        runs.append(quietly(process_of("gpt"), train_gpt.Config(**flags, **few)))
    elif stage == "sft":
        sft = quietly(process_of("sft"), train_sft.Config(**flags, **few, init=gpt))
        runs.append(sft)
    elif stage == "rm":
        rm = quietly(process_of("rm"), train_rm.Config(**flags, **few, init=sft))
        runs.append(rm)
    if stage != "gpt":
        ppo |= {"seed": seed, "mistake": mistake if stage == "ppo" else ""}
        runs.append(quietly(process_of("ppo"), train_ppo.Config(init=sft, reward=rm, **ppo)))
    metrics = {name: values for run in runs for name, values in metrics_of(run).items()}
    return [{"metric": name, "first": x[0], "last": x[-1]} for name, x in metrics.items()]


def process_of(stage):
    """What `quietly` runs: the script in a process of its own, with all the flags of a Config."""
    run = partial(subprocess.run, check=True)
    return SimpleNamespace(main=lambda cfg: run(words(stage, cfg), stdout=sys.stdout))


def words(stage, cfg):
    """The command line that has these flags."""
    found = [sys.executable, str(ROOT / f"train_{stage}.py")]
    for flag, value in asdict(cfg).items():
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        elif value != []:
            found += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return found


def metrics_of(run):
    """{metric: its values in a run}, of those that are shown."""
    rows = read_rows(Path(run, "metrics.csv"))[1]
    columns = {name: [float(row[name]) for row in rows if name in row] for name in SHOWN.split()}
    return {name: values for name, values in columns.items() if values}


if __name__ == "__main__":
    main(from_cli(Config))
