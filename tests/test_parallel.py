"""Two processes on a CPU do what one does: gradients, metrics, samples, files, ends.

This file is also the program that torchrun runs: `-m tests.test_parallel JOB FOLDER`.
"""

import csv
import math
import os
import signal
import subprocess
import sys
from dataclasses import astuple, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_gpt
import train_ppo
import train_rm
import train_sft
from nanorlhf import config, engine
from nanorlhf.config import TrainConfig
from nanorlhf.functional import lm_loss
from nanorlhf.llama import LlamaConfig
from nanorlhf.machine import process, ranks
from nanorlhf.machine.device import pick_device
from nanorlhf.machine.process import rank, world_size
from nanorlhf.model import GPT, GPTConfig
from nanorlhf.run import checkpoint
from nanorlhf.tokenizer import byte_tokenizer

ROOT = Path(__file__).parents[1]

torch.set_num_threads(1)
CPU, TOKENIZER = torch.device("cpu"), byte_tokenizer()
SIZES = GPTConfig(TOKENIZER.vocab_size, block_size=16, n_layer=2, n_head=2, d_model=8)
LLAMA = LlamaConfig(*astuple(SIZES), n_kv_head=1, d_head=4, d_mlp=24, qk_norm=True, is_tied=False)
CASES = [(rows, accum) for rows in (1, 3, 5, 6) for accum in (1, 2)]


# ---- what one process does, and two ------------------------------------------------------------


def make_batch(rows):
    """Rows of random tokens, each with another number of positions in the loss."""
    rng = np.random.default_rng(rows)
    tokens = torch.from_numpy(rng.integers(0, 256, (rows, 12)))
    mask = torch.arange(12) < torch.from_numpy(rng.integers(3, 12, rows))[:, None]
    weight = mask[:, 1:].sum(1).float()
    return {"tokens": tokens, "mask": mask, "weight": weight, "source": ["here"] * rows}


def loss_fn(model, batch):
    inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
    loss = lm_loss(model(inputs), targets, batch["mask"][:, 1:])
    return loss, {"twice": 2 * loss.detach()}


def gradients(dtype, shard=False, sizes=SIZES):
    """Case -> (the gradient that AdamW sees, the step's metrics, those of an evaluation). Initial
    weights differ between ranks until Optimizer has rank 0's."""
    found = {}
    for rows, accum in CASES:
        cfg = TrainConfig(grad_accum=accum, grad_clip=1e9, shard=shard and world_size() > 1)
        torch.manual_seed(rank())
        model = sizes.build()
        optimizer = engine.Optimizer(model, cfg, getattr(torch, dtype), CPU)
        seen = []
        see = lambda o=optimizer, s=seen: s.extend(
            ranks.whole(o.masters[n].grad).clone() for n in o.trained
        )
        optimizer.adamw.step = see
        metrics = engine.train_step(model, loss_fn, make_batch(rows), cfg, optimizer, 1e-3, CPU)
        batches = [make_batch(n) for n in range(1, rows + 1)]
        evaluated = engine.evaluate(model, loss_fn, batches, cfg, CPU)
        found[rows, accum] = torch.cat([g.flatten() for g in seen]), metrics, evaluated
    return found


def stages(folder, shard=False, arch="gpt2"):
    """The four stages on little data of the embedded world; SFT in three pieces, of which the
    one in the middle is not sharded."""
    shard = shard and world_size() > 1
    at = lambda name: str(Path(folder, name))
    common = {"device": "cpu", "dtype": "float32", "batch_size": 5, "shard": shard}
    often = common | {"eval_every": 2, "save_every": 2, "max_steps": 3}
    gpt = train_gpt.Config(
        out_dir=at("gpt"),
        documents=60,
        vocab_size=300,
        arch=arch,
        n_layer=2,
        n_head=1,
        d_model=8,
        block_size=200,
        sample_tokens=4,
        grad_accum=2,
        **often,
    )
    train_gpt.main(gpt)
    sft = train_sft.Config(
        out_dir=at("sft"), init=at("gpt"), demonstrations=60, max_new_tokens=8, **often
    )
    train_sft.main(sft)
    train_sft.main(replace(sft, max_steps=5, resume=True, shard=False))
    train_sft.main(replace(sft, max_steps=6, resume=True))
    start = {"init": at("sft"), "max_new_tokens": 8}
    rm = train_rm.Config(
        out_dir=at("rm"), sft=at("sft"), prompts=8, heldout_prompts=4, **start | often
    )
    train_rm.main(rm)
    ppo = train_ppo.Config(
        out_dir=at("ppo"), reward=at("rm"), minibatch_size=4, eval_prompts=1, **start | often
    )
    train_ppo.main(ppo)


def whole_rows_come_back():
    """Of any number of rows, and as wide as on the rank where they are widest."""
    for n in range(1, 6):
        x = torch.arange(n * 3).view(n, 3)
        own = x[ranks.rows(n)][:, : 3 - rank()]  # narrower on rank 1
        padded = ranks.pad_alike(own, -1)
        assert padded.shape[1] == 3 and (padded[:, 3 - rank() :] == -1).all()
        assert torch.equal(ranks.gather(x[ranks.rows(n)], n), x)
        assert torch.equal(ranks.gather((x > 2)[ranks.rows(n)], n), x > 2)


def everything(folder):
    pick_device(TrainConfig(device="cpu"))
    whole_rows_come_back()
    found = {
        (sizes is LLAMA, dtype, shard): gradients(dtype, shard, sizes)
        for sizes in (SIZES, LLAMA)
        for dtype in ("float32", "bfloat16")
        for shard in (False, True)
    }
    if rank() == 0:
        torch.save(found, Path(folder, "gradients.pt"))
    else:
        sys.addaudithook(no_writing(folder))
    for name in ("plain", "sharded"):
        print("----", name)
        stages(Path(folder, name), shard=name == "sharded")
    print("---- a Llama")
    stages(Path(folder, "llama"), shard=True, arch="llama")
    LEAVE()


def no_writing(folder):
    def hook(event, args):
        written = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if written and str(args[0]).startswith(str(folder)):
            print(f"rank {rank()} writes {args[0]}", file=sys.stderr, flush=True)
            os._exit(9)

    return hook


def endless(folder, at_step_3):
    """A stage with many steps, in whose fourth something happens on rank 1."""
    cfg = TrainConfig(out_dir=folder, device="cpu", max_steps=10**6, eval_every=10**5)

    def next_batch(step):
        if step == 3 and rank():
            at_step_3()
        return make_batch(4)

    torch.manual_seed(0)
    val = [make_batch(2)]
    signal.signal(signal.SIGINT, process.interrupted)  # as `from_cli` does
    engine.claim(cfg)
    engine.train("gpt", cfg, GPT(SIZES), loss_fn, next_batch, val, TOKENIZER, cfg.max_steps)


def mistaken(folder):
    """Both ranks die of the same. The second waits to be ended, however long torchrun takes over
    that on a busy machine; a user's would speak after 3 seconds."""
    config.time = SimpleNamespace(sleep=lambda seconds: signal.pause())
    train_sft.main(train_sft.Config(init=f"{folder}/nowhere"))


def run_job(job, folder):
    if job == "everything":  # the stages run one after another in the same processes
        ranks.leave = lambda: None
    {
        "everything": lambda: everything(folder),
        "killed": lambda: endless(folder, lambda: os.kill(os.getpid(), signal.SIGKILL)),
        "signalled": lambda: endless(folder, lambda: os.kill(os.getpid(), signal.SIGTERM)),
        "mistaken": lambda: mistaken(folder),
    }[job]()


# ---- tests -------------------------------------------------------------------------------------


def start(job, folder):
    """torchrun with two processes, on a port that is free."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*torchrun, "-m", "tests.test_parallel", job, str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )


def end_of(process, seconds=600):
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, out, err


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes found and printed, and their folder."""
    folder = tmp_path_factory.mktemp("two")
    status, out, err = end_of(start("everything", folder))
    assert status == 0, err
    return folder, out


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    stages(folder)
    stages(folder / "llama", arch="llama")
    return folder


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("sizes", [SIZES, LLAMA], ids=["gpt", "llama"])
def test_the_same_global_batch_gives_the_same_gradients(two, dtype, tolerance, shard, sizes):
    found = torch.load(two[0] / "gradients.pt", weights_only=False)[sizes is LLAMA, dtype, shard]
    for case, (wanted, metrics, evaluated) in gradients(dtype, sizes=sizes).items():
        grad, *others = found[case]
        scale = wanted.abs().max().item()
        torch.testing.assert_close(grad, wanted, rtol=0, atol=tolerance * scale)
        for mean, other in zip((metrics, evaluated), others):
            assert mean.keys() == other.keys()
            for name in mean:
                assert math.isclose(mean[name], other[name], rel_tol=tolerance), (case, name)


def rows_of(folder):
    return list(csv.reader(Path(folder, "metrics.csv").open()))


def assert_same_metrics(a, b):
    a, b = rows_of(a), rows_of(b)
    assert a[0] == b[0] and len(a) == len(b)
    for row, other in zip(a[1:], b[1:]):
        for name, x, y in zip(a[0], row, other):
            same = x == y or math.isclose(float(x), float(y), rel_tol=1e-3, abs_tol=2e-5)
            assert same, (name, x, y)


@pytest.mark.parametrize("stage", ["gpt", "sft", "rm", "ppo"])
@pytest.mark.parametrize("how", ["plain", "sharded", "llama"])
def test_every_stage_has_the_same_metrics_weights_and_state(two, one, stage, how):
    alone = one / "llama" if how == "llama" else one
    assert_same_metrics(two[0] / how / stage, alone / stage)
    a, b = [checkpoint.find(f / stage, "latest") for f in (two[0] / how, alone)]
    load = lambda path, name: torch.load(path / name, weights_only=True)
    weights, wanted = load(a, "weights.pt"), load(b, "weights.pt")
    assert weights.keys() == wanted.keys()
    for name, w in wanted.items():
        torch.testing.assert_close(weights[name], w, rtol=0, atol=1e-4)
    state, wanted = load(a, "state.pt")["optimizer"], load(b, "state.pt")["optimizer"]
    assert state["param_groups"] == wanted["param_groups"]
    for i, slots in wanted["state"].items():
        for name, x in slots.items():
            torch.testing.assert_close(state["state"][i][name], x, rtol=1e-2, atol=1e-4)


def test_one_rank_speaks_and_says_what_a_run_alone_says(two, tmp_path, capsys):
    """Samples, notes and reports; lines with a clock or a folder apart."""
    stages(tmp_path / "again")
    told = lambda text: [
        line
        for line in text.splitlines()
        if line.startswith(("  sample", "  prompt", "         |", "  accuracy", "  predicted"))
    ]
    alone = told(capsys.readouterr().out)
    _, plain, sharded, _ = two[1].split("---- ")
    assert len(alone) > 20
    assert told(plain) == told(sharded) == alone


def test_both_ranks_read_the_files_that_one_wrote(two, one):
    """(That the other wrote none is checked where it runs.)"""
    names = lambda folder: sorted(
        str(p.relative_to(folder))
        for stage in ("gpt", "sft", "rm", "ppo")
        for p in (folder / stage).rglob("*")
        if p.is_file()
    )
    assert names(two[0] / "plain") == names(two[0] / "sharded") == names(one)
    for name in ("sft/demonstrations.jsonl", "gpt/train.bin"):
        assert (two[0] / "plain" / name).read_bytes() == (one / name).read_bytes()


@pytest.mark.parametrize("how", ["plain", "sharded"])
def test_one_process_goes_on_from_a_checkpoint_of_two(two, one, how):
    for folder in (two[0] / how, one):
        cfg = train_ppo.Config(
            out_dir=str(folder / "ppo"),
            init=str(folder / "sft"),
            reward=str(folder / "rm"),
            minibatch_size=4,
            eval_prompts=1,
            max_new_tokens=8,
            device="cpu",
            dtype="float32",
            batch_size=5,
            max_steps=5,
            eval_every=2,
            save_every=1,
            resume=True,
        )
        if checkpoint.load(cfg.out_dir, "lm", "latest").step == 3:
            train_ppo.main(cfg)
    assert len(rows_of(one / "ppo")) == 7
    assert_same_metrics(two[0] / how / "ppo", one / "ppo")


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_and_is_named(tmp_path):
    jobs = ("killed", "mistaken", "signalled")
    running = {job: start(job, tmp_path / job) for job in jobs}
    ends = {job: end_of(process) for job, process in running.items()}
    errors = {
        job: [line for line in err.splitlines() if line.startswith("error: ")]
        for job, (_, _, err) in ends.items()
    }
    assert ends["killed"][0] == ends["mistaken"][0] == 1
    root_cause = ends["killed"][2].split("Root Cause")[1]
    assert "rank      : 1 " in root_cause and "SIGKILL" in root_cause
    assert len(errors["mistaken"]) == 1 and "no checkpoint there" in errors["mistaken"][0]
    # a signal that only one rank gets ends both after the same step, saved
    assert "exitcode  : 143" in ends["signalled"][2] and not errors["signalled"]
    step = checkpoint.load(tmp_path / "signalled", "lm").step
    assert step < 10 and f"ended at step {step} of" in ends["signalled"][1]


def test_what_only_one_rank_dies_of_is_said_by_that_one(monkeypatch, capsys):
    """After the time in which torchrun would have ended it, had the first died as well."""
    slept = []
    monkeypatch.setattr(config.time, "sleep", slept.append)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        config.die("no room on the disk")
    assert slept == [3] and capsys.readouterr().err == "error: rank 1: no room on the disk\n"


def test_sharding_takes_torchrun(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        gradients_cfg = TrainConfig(shard=True)
        engine.Optimizer(GPT(SIZES), gradients_cfg, torch.float32, CPU)
    assert end.value.code == 2 and "torchrun" in capsys.readouterr().err


LEAVE = ranks.leave

if __name__ == "__main__":
    run_job(*sys.argv[1:])
