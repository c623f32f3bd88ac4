"""What do famous mistakes look like in a run? Each of `--mistake`, beside the healthy run.

    python -m experiments.mistakes              # about 2 hours of one core
    python -m experiments.mistakes --quick

A broken stage starts from the healthy one before it. Where PPO comes after it, PPO starts from what
came out: its first evaluation shows what became of the SFT model, its last of the reward model. A
broken run is a process of its own, as the mistake stays in the process that it is put into. The
curves of healthy runs, of --band seeds, go to healthy.csv: docs/results has it, for `plot`.
"""

import csv
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import train_gpt
import train_ppo
import train_rm
import train_sft
from experiments.lab import Lab, LabConfig, interval, models_of, numbers, quietly
from nanorlhf.config import arg, from_cli
from nanorlhf.course.mistakes import OF_STAGE, SHOWN
from nanorlhf.run.metrics import read_rows

# of the hundred columns of four stages those that a healthy run is known by
BAND = """loss val_loss accuracy val_accuracy val_margin grad_norm scores scores_sd rewards gold kl
kl_exact kl_k3 entropy length eos_rate explained_variance advantages_sd value_loss approx_kl
clipfrac eval_scores eval_gold eval_kl_exact eval_length eval_eos_rate eval_entropy""".split()


@dataclass
class Config(LabConfig):
    """The metrics of runs that are broken on purpose, beside a healthy run's."""

    QUICK = {"seeds": [1], "band": [1], "steps": 2}
    band: list[int] = arg(list(range(1, 9)), "seeds of healthy runs")
    steps: int = arg(24, "iterations of PPO")


def main(cfg):
    lab = Lab(cfg, "mistakes", "seed stage mistake metric first last", "steps")
    n = 1 if cfg.quick else None  # mistakes of a stage
    names = {s: ["", *(m.__name__ for m in of[:n])] for s, of in OF_STAGE.items()}
    arms = [{"stage": stage, "mistake": name} for stage in names for name in names[stage]]
    rows = lab.each(measured, [arm | {"seed": seed} for arm in arms for seed in cfg.seeds])
    for arm in arms:
        print(f"\n{arm['stage']}: {arm['mistake'] or 'healthy'}")
        for metric in SHOWN.split():
            if any(row["metric"] == metric and arm.items() <= row.items() for row in rows):
                first, last = (numbers(rows, x, metric=metric, **arm) for x in ("first", "last"))
                text = f"  {metric:18} {first.mean():8.3f} -> {last.mean():8.3f}"
                good = numbers(rows, "last", metric=metric, **arm | {"mistake": ""})
                print(f"{text}, {interval(last - good):+.3f} to healthy")
    write_band(lab)


def runs_of(lab, seed, stage="", mistake=""):
    """{stage: its run}: the healthy ones, or with a broken one from `stage` on."""
    cfg, to = lab.cfg, f"{lab.folder}/{seed}_{mistake or 'healthy'}"
    gpt, sft, rm = models_of(cfg, seed)
    runs, broken = {"gpt": gpt, "sft": sft, "rm": rm}, {"seed": seed, "mistake": mistake}
    broken |= {"out_dir": f"{to}/{stage}"} | ({"max_steps": 20} if cfg.quick else {})
    if mistake and stage == "gpt":
        return runs | {stage: apart(train_gpt.Config(**broken))}
    if mistake and stage == "sft":
        runs[stage] = apart(train_sft.Config(**broken, init=gpt))
    elif mistake and stage == "rm":
        runs[stage] = apart(train_rm.Config(**broken, init=sft))
    ppo = {"seed": seed, "mistake": mistake * (stage == "ppo"), "max_steps": cfg.steps}
    ppo |= {"init": runs["sft"], "reward": runs["rm"], "out_dir": f"{to}/ppo"}
    return runs | {"ppo": apart(train_ppo.Config(**ppo))}


def apart(cfg):
    """`quietly`, in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(quietly, cfg).result()


def measured(lab, stage, mistake, seed):
    """The first and last value of each metric, of the stage and of PPO after it."""
    runs = runs_of(lab, seed, stage, mistake)
    after = [] if stage == "gpt" else [runs["ppo"]]
    metrics = {name: x for run in (runs[stage], *after) for name, x in metrics_of(run).items()}
    return [{"metric": name, "first": x[0], "last": x[-1]} for name, x in metrics.items()]


def write_band(lab):
    """The metrics of healthy runs by stage, seed and step: what `plot` draws a run over."""
    with (lab.folder / "healthy.csv").open("w") as file:
        to = csv.DictWriter(file, ["stage", "seed", "step", *BAND], lineterminator="\n")
        to.writeheader()
        for seed in lab.cfg.band:
            for stage, run in runs_of(lab, seed).items():
                for row in read_rows(Path(run, "metrics.csv"))[1]:
                    cells = {name: f"{float(row[name]):.4g}" for name in BAND if name in row}
                    to.writerow({"stage": stage, "seed": seed, "step": row["step"]} | cells)


def metrics_of(run):
    """{metric: its values in a run}, of those that are shown."""
    rows = read_rows(Path(run, "metrics.csv"))[1]
    columns = {name: [float(row[name]) for row in rows if name in row] for name in SHOWN.split()}
    return {name: values for name, values in columns.items() if values}


if __name__ == "__main__":
    main(from_cli(Config))
