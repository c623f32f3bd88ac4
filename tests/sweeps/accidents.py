"""Runs of all four stages to which something happens, and which go on until they have ended.

    python -m tests.sweeps.accidents 100 10     # kills in all, and of each other accident a stage

Every stage runs once undisturbed. Then it runs again in a process of its own, in a folder that an
earlier run has used, and gets SIGKILL after a random time, again and again: --resume goes on. Other
runs get SIGINT or SIGTERM, files that cannot grow beyond a random size, as on a full disk, a second
run in their folder, or their folder is removed. After each accident every checkpoint that is
pointed to must load, no run may show a traceback, and at the end weights, optimizer state, metrics
and reports must be those of the undisturbed run, bit for bit.
"""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

import train_gpt
import train_ppo
import train_rm
import train_sft
from nanorlhf.machine import process
from nanorlhf.run import checkpoint, session

ROOT = Path(__file__).parents[2]

STAGES = {"gpt": train_gpt, "sft": train_sft, "rm": train_rm, "ppo": train_ppo}
REWARD = '''
import random
def reward(prompts, responses):
    """Noisy, as a user's own may be: the random state is part of a run."""
    return [len(set(r)) / 10 + random.random() for r in responses]
'''


def configs(start, out):
    """A small run of every stage in the embedded world, that starts from `start` and writes to
    `out`. It saves every second step, and evaluates at others."""
    often = {
        "device": "cpu",
        "batch_size": 4,
        "max_steps": 8,
        "eval_every": 3,
        "save_every": 2,
        "check": False,
    }
    short = {"max_new_tokens": 8}
    (start / "reward.py").write_text(REWARD)
    return {
        "gpt": train_gpt.Config(
            out_dir=f"{out}/gpt",
            documents=80,
            vocab_size=300,
            n_layer=2,
            n_head=2,
            d_model=16,
            block_size=200,
            sample_tokens=4,
            dropout=0.1,
            **often,
        ),
        "sft": train_sft.Config(
            out_dir=f"{out}/sft",
            init=f"{start}/gpt",
            demonstrations=60,
            dropout=0.1,
            **often,
            **short,
        ),
        "rm": train_rm.Config(
            out_dir=f"{out}/rm",
            init=f"{start}/sft",
            sft=f"{start}/sft",
            prompts=40,
            heldout_prompts=4,
            **often,
            **short,
        ),
        "ppo": train_ppo.Config(
            out_dir=f"{out}/ppo",
            init=f"{start}/sft",
            reward=f"{start}/reward.py:reward",
            minibatch_size=2,
            eval_prompts=4,
            kl_target=6.0,
            **often,
            **short,
        ),
    }


def end_by_signal(stage, cfg, step):
    """Run a stage in this process, to which SIGTERM comes in front of a step."""
    due = session.Run.due

    def signalled(run, at):
        if at == step:
            process._heard.append((signal.SIGTERM, 0.0))
        return due(run, at)

    try:
        with mock.patch.object(session.Run, "due", signalled):
            STAGES[stage].main(cfg)
    except SystemExit as end:
        assert end.code == 128 + signal.SIGTERM
    finally:
        process._heard.clear()


def in_child(stage, cfg, log, room=None):
    """Run a stage in a process of its own, as its script would; returns its id. `room`: the size
    in bytes beyond which no file can grow."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    signal.signal(signal.SIGINT, process.interrupted)  # as `from_cli` does
    try:
        with log.open("ab") as file:  # through another process, which may write what it likes
            pipe = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file).stdin.fileno()
        for number in (1, 2):
            os.dup2(pipe, number)
        if room:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        STAGES[stage].main(cfg)
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def wait(pid, seconds=600, then=signal.SIGKILL):
    """Wait for a process, but send it a signal after so many seconds; its exit status, negative
    where a signal ended it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(pid, then)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def corrupt(folder, stage):
    """What cannot be read of what `latest` and `best` point to, in words."""
    for pointer in ("latest", "best"):
        if Path(folder, pointer).exists():
            try:
                saved = checkpoint.load(folder, prefer=pointer)
                assert saved.stage == stage, saved.stage
                torch.load(saved.path / "state.pt", weights_only=True)
            except (SystemExit, Exception) as error:
                return f"{folder}: {pointer}: {error!r}"
    return ""


def differs(a, b):
    """In what a run's results differ from another's, in words."""
    for name in ("metrics.csv", "report.json", "latest", "best"):
        if len({(f / name).read_bytes() if (f / name).exists() else None for f in (a, b)}) > 1:
            return name
    for pointer in ("latest", "best"):
        one, other = [checkpoint.load(f, prefer=pointer) for f in (a, b)]
        states = [torch.load(c.path / "state.pt", weights_only=True) for c in (one, other)]
        if not same(one.weights, other.weights):
            return f"weights of {pointer}"
        if not same(*states):
            return f"state of {pointer}"
    return ""


def same(x, y):
    """Equal to the bit, in nested dicts and lists too."""
    if torch.is_tensor(x):
        return torch.equal(x, y)
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(same(v, y[k]) for k, v in x.items())
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(map(same, x, y))
    return x == y


class Accidents:
    """What happens to one stage; complaints are collected, and the number of accidents."""

    def __init__(self, stage, whole, cfg, rng, log):
        self.stage, self.whole, self.rng, self.log = stage, whole, rng, log
        self.cfg, self.out = cfg, Path(cfg.out_dir)
        self.complaints, self.counts = [], {}
        began = time.monotonic()
        self.expect("undisturbed", wait(in_child(stage, whole, log)), 0)
        self.seconds = time.monotonic() - began

    def expect(self, what, status, *allowed):
        if status not in allowed:
            self.complaints.append(f"{self.stage}: {what}: exit status {status}, see {self.log}")
        return status in allowed

    def after(self, what):
        """An accident has happened: is everything that is there readable?"""
        self.counts[what] = self.counts.get(what, 0) + 1
        self.complaints += filter(None, [corrupt(self.out, self.stage)])

    def finish(self, what):
        """Go on to the end: is it the undisturbed run?"""
        cfg = replace(self.cfg, resume=self.has_begun())
        if self.expect(f"resumed after {what}", wait(in_child(self.stage, cfg, self.log)), 0):
            if difference := differs(Path(self.whole.out_dir), self.out):
                self.complaints.append(f"{self.stage}: after {what} {difference} differs")
        shutil.rmtree(self.out)

    def kills(self, n):
        """Of a new run in the folder of an earlier one, and again and again as it goes on."""
        while self.counts.get("kills", 0) < n:
            earlier = replace(self.cfg, seed=2, max_steps=4)
            self.expect("earlier run", wait(in_child(self.stage, earlier, self.log)), 0)
            status = -signal.SIGKILL
            while status and self.counts.get("kills", 0) < n:
                cfg = replace(self.cfg, resume=self.has_begun())
                moment = self.rng.uniform(0, self.seconds)
                status = wait(in_child(self.stage, cfg, self.log), moment)
                if self.expect("kill", status, -signal.SIGKILL, 0) and status:
                    self.after("kills")
            self.finish("kills")

    def has_begun(self):
        """Before it has, what can be resumed in the folder is the earlier run."""
        path = checkpoint.newest(self.out)
        return path is None or checkpoint.load(path).config["flags"]["seed"] == self.cfg.seed

    def signals(self, n):
        """Until it listens, a signal ends a run at once."""
        for i in range(n):
            number = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[i % 3]
            moment = self.rng.uniform(0, self.seconds)
            status = wait(in_child(self.stage, self.cfg, self.log), moment, number)
            self.expect("signal", status, 128 + number, -number, 0)
            self.after("signals")
            self.finish("signals")

    def full_disk(self, n):
        largest = max(p.stat().st_size for p in Path(self.whole.out_dir).rglob("*") if p.is_file())
        for _ in range(n):
            room = self.rng.randrange(1, largest)
            self.expect("full disk", wait(in_child(self.stage, self.cfg, self.log, room)), 2)
            self.after("full disks")
            self.finish("full disk")

    def lost_folder(self, n):
        for _ in range(n):
            pid = in_child(self.stage, self.cfg, self.log)
            time.sleep(self.rng.uniform(0.2, 0.8) * self.seconds)
            shutil.rmtree(self.out, ignore_errors=True)
            self.expect("lost folder", wait(pid), 2, 0)
            shutil.rmtree(self.out, ignore_errors=True)
            self.counts["lost folders"] = self.counts.get("lost folders", 0) + 1

    def second_run(self, n):
        for _ in range(n):
            first = in_child(self.stage, self.cfg, self.log)
            while not (self.out / ".lock").exists():
                time.sleep(0.001)
            self.expect("second run", wait(in_child(self.stage, self.cfg, self.log)), 2)
            self.expect("first of two runs", wait(first), 0)
            self.after("second runs")
            self.finish("second run")


def run(folder, kills, others, seed=1):
    """So many kills in all, and of other accidents so many in each stage; the complaints."""
    rng, complaints = random.Random(seed), []
    start = folder / "whole"
    start.mkdir()
    torch.optim.AdamW([torch.zeros(1)])  # imports half of torch: here, and not in every child
    whole, disturbed = configs(start, start), configs(start, folder / "disturbed")
    for i, stage in enumerate(STAGES):
        log = folder / f"{stage}.log"
        accidents = Accidents(stage, whole[stage], disturbed[stage], rng, log)
        accidents.kills(kills * (i + 1) // 4 - kills * i // 4)
        for kind in (
            accidents.signals,
            accidents.full_disk,
            accidents.lost_folder,
            accidents.second_run,
        ):
            kind(others)
        if "Traceback" in log.read_text(errors="replace"):
            accidents.complaints.append(f"{stage}: a traceback in {log}")
        counts = ", ".join(f"{n} {what}" for what, n in accidents.counts.items())
        print(f"{stage}: {counts}: {len(accidents.complaints)} complaints", flush=True)
        complaints += accidents.complaints
    return complaints


def main():
    torch.set_num_threads(1)  # a process with threads cannot be forked safely
    kills, others = [int(n) for n in [*sys.argv[1:], 100, 10][:2]]
    folder = Path(tempfile.mkdtemp())
    complaints = run(folder, kills, others)
    print(f"{len(complaints)} complaints; logs in {folder}")
    print(*complaints, sep="\n")
    raise SystemExit(bool(complaints))


if __name__ == "__main__":
    main()
