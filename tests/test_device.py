"""What a device must not change. The same checks run on the CPU in every `make test`, and on a GPU:

    TEST_DEVICE=cuda python -m pytest tests/test_device.py

Logits are held against float64 on the CPU. A GPU decodes with a static cache and CUDA graphs; on
the CPU that way is gone too, with a stand-in for the graph itself.
"""

import csv
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanorlhf import sampling
from nanorlhf.data.batches import pad
from nanorlhf.llama import LlamaConfig
from nanorlhf.machine import compiled
from nanorlhf.model import GPTConfig
from nanorlhf.run import checkpoint
from nanorlhf.sampling import KVCache, generate, uniforms
from tests.helpers import stand_in_for_cuda_graphs
from tests.sweeps import accidents

DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cpu"))
EOS, PAD, T = 48, 49, 40
ARCH = "gpt2"  # what `model` makes; the fixture `arch` tries both
LOGITS = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # what rounding may move a logit by
SLOW = [pytest.mark.slow] if DEVICE.type == "cpu" else []
each_dtype = pytest.mark.parametrize("dtype", LOGITS, ids=lambda d: str(d)[6:])
each_cache = pytest.mark.parametrize("static", [True, False], ids=["static", "growing"])


@pytest.fixture(params=["gpt2", "llama"])
def arch(request, monkeypatch):
    monkeypatch.setitem(globals(), "ARCH", request.param)


@pytest.fixture(autouse=True)
def stand_in_for_graphs(monkeypatch):
    """Where there is no CUDA: what is recorded does not happen, and a replay is one more step."""
    if DEVICE.type == "cuda":
        return
    steps, repeat = [], sampling.repeat
    recording = stand_in_for_cuda_graphs(monkeypatch, lambda: steps[-1]())

    def with_stand_in(step, n, device):
        steps.append(lambda: None if recording else step())
        repeat(steps[-1], n, device)

    monkeypatch.setattr(sampling, "repeat", with_stand_in)


@pytest.fixture
def rows():
    torch.manual_seed(2)
    return [torch.randint(0, EOS, (n,)).tolist() for n in (1, 7, 20, 12)]


def model(dtype=torch.float32, device=DEVICE):
    torch.manual_seed(1)
    sizes = {"block_size": 64, "n_layer": 2, "n_head": 2, "d_model": 32}
    if ARCH == "llama":  # with two queries for each key
        config = LlamaConfig(50, **sizes, n_kv_head=1, d_head=16, d_mlp=64)
    else:
        config = GPTConfig(50, **sizes)
    return config.build().eval().to(device, dtype)


def exact(dtype, rows):
    """Logits of each row alone, in float64 on the CPU, of the weights as rounded to dtype."""
    gpt = model(dtype, "cpu").double()
    with torch.no_grad():
        return [gpt(torch.tensor([row]))[0] for row in rows]


def answers(rows, temperature=1.0):
    tokens, mask = (x.to(DEVICE) for x in pad(rows, PAD, left=True))
    noise = uniforms(1, 0, range(len(rows)), T)
    return generate(model(), tokens, mask, T, EOS, PAD, noise, temperature).cpu()


@each_dtype
@torch.no_grad()
def test_logits_are_those_of_float64(dtype, rows, arch):
    found = model(dtype)(pad(rows, PAD)[0].to(DEVICE)).cpu()
    for logits, wanted in zip(found, exact(dtype, rows)):
        assert (logits[: len(wanted)] - wanted).abs().max() < LOGITS[dtype]


@each_cache
@each_dtype
@torch.no_grad()
def test_token_by_token_logits_are_those_of_the_whole_row(dtype, static, rows, arch, monkeypatch):
    """Padded on the left, from caches of either kind."""
    monkeypatch.setattr(sampling, "is_static", lambda device: static)
    gpt, more = model(dtype), torch.randint(0, EOS, (len(rows), 8))
    tokens, mask = (x.to(DEVICE) for x in pad(rows, PAD, left=True))
    cache = KVCache(gpt.config, (~mask).sum(1), tokens.shape[1] + 8, dtype)
    cache.reach(tokens.shape[1] + 8)
    steps = [tokens, *more.to(DEVICE).split(1, 1)]
    found = torch.stack([gpt(step, cache)[:, -1] for step in steps], 1).cpu()  # (B, 9, V)
    whole = [row + new.tolist() for row, new in zip(rows, more)]
    wanted = torch.stack([logits[-9:] for logits in exact(dtype, whole)])
    assert (found - wanted).abs().max() < LOGITS[dtype]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_either_cache_with_or_without_a_graph_gives_the_same_text(
    temperature, rows, arch, monkeypatch
):
    """Rows that end leave the batch on the way: of 4 * 40 rows some do."""
    rows, found = rows * 40, []
    for static in (True, False):
        monkeypatch.setattr(sampling, "is_static", lambda device, static=static: static)
        found.append(answers(rows, temperature))
    assert torch.equal(*found)
    assert (found[0] == EOS).any(1).float().mean() > 0.2 or temperature == 0


@pytest.mark.parametrize("static", [pytest.param(True, marks=SLOW)])
def test_compiled_decoding_gives_the_same_text(static, rows, arch, monkeypatch):
    """On a GPU by inductor, in a CUDA graph; on the CPU by PyTorch's own kernels."""
    monkeypatch.setattr(sampling, "is_static", lambda device: static)
    plain = answers(rows * 40)
    compiled.choose(True)
    backend = "aot_eager" if DEVICE.type == "cpu" else compiled.backend
    monkeypatch.setattr(compiled, "backend", backend)
    assert torch.equal(answers(rows * 40), plain)
    compiled.choose(False)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 64])
def test_a_step_is_done_as_often_as_it_is_asked_for(n, monkeypatch):
    """Recorded or not: the same sum, of tensors that change in place."""
    for static in (True, False):
        monkeypatch.setattr(sampling, "is_static", lambda device, static=static: static)
        total, i = torch.zeros(1, device=DEVICE), torch.zeros(1, device=DEVICE)

        def step(total=total, i=i):
            i.add_(1)
            total.add_(i)

        sampling.repeat(step, n, DEVICE)
        assert total.item() == n * (n + 1) / 2


def stages(folder, out, dtype="float32"):
    """Small runs of the four stages, checked, on the device."""
    found = accidents.configs(folder, out)
    return {s: replace(c, device=str(DEVICE), dtype=dtype, check=True) for s, c in found.items()}


# slow on a processor that has no bfloat16
BFLOAT16 = pytest.param("bfloat16", 0.2, marks=SLOW)


@pytest.mark.parametrize("dtype, near", [("float32", 1e-4), BFLOAT16])
def test_all_stages_run_and_ppo_starts_at_its_reference(dtype, near, tmp_path):
    """Each with --check, plainly and with what takes another way through the model."""
    for stage, cfg in stages(tmp_path, tmp_path, dtype).items():
        accidents.STAGES[stage].main(cfg)
        cfg = replace(cfg, out_dir=f"{tmp_path}/{stage}_2", max_steps=2, grad_checkpointing=True)
        variants = [{}]
        if stage == "ppo":
            reward = f"{tmp_path}/rm"
            variants = [{"critic": "separate", "reward": reward}, {"freeze_layers": 1}]
        for flags in variants:
            accidents.STAGES[stage].main(replace(cfg, **flags))
            if stage == "ppo":
                first = next(csv.DictReader(Path(cfg.out_dir, "metrics.csv").open()))
                assert abs(float(first["kl"])) < near  # --check has held the first ratio to 1


def test_a_resumed_run_is_the_undisturbed_one(tmp_path):
    """To the bit on a CPU; on a GPU, where sums have no fixed order, to rounding."""
    start = tmp_path / "whole"
    start.mkdir()
    whole = stages(start, start)
    for stage, cfg in stages(start, tmp_path / "cut").items():
        accidents.STAGES[stage].main(whole[stage])
        accidents.end_by_signal(stage, cfg, step=5)
        accidents.STAGES[stage].main(replace(cfg, resume=True))
        ends = [checkpoint.load(c.out_dir, prefer="latest") for c in (cfg, whole[stage])]
        near = {"rtol": 0, "atol": 0 if DEVICE.type == "cpu" else 1e-4}
        for name, w in ends[0].weights.items():
            torch.testing.assert_close(w, ends[1].weights[name], **near, msg=f"{stage} {name}")
