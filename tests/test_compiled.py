"""--compile: losses and gradients are those without it, and few functions are compiled.

Compiling takes seconds, so most of these tests are slow ones. They take aot_eager, which goes the
way of inductor up to the kernels; one tries the backend that this machine has.
"""

import shutil
from dataclasses import replace

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters

from nanorlhf import sampling
from nanorlhf.fused import head_loss
from nanorlhf.llama import LlamaConfig
from nanorlhf.machine import compiled
from nanorlhf.model import GPTConfig, freeze_layers
from nanorlhf.run import checkpoint
from nanorlhf.sampling import generate, uniforms
from tests.sweeps import accidents

SIZES = {"block_size": 64, "n_layer": 3, "n_head": 2, "d_model": 32}
GPT2 = GPTConfig(50, **SIZES)
LLAMA = LlamaConfig(50, **SIZES, n_kv_head=1, d_head=16, d_mlp=64, qk_norm=True)


@pytest.fixture(autouse=True)
def afresh():
    """Nothing is compiled before a test, and nothing after it."""
    torch._dynamo.reset()
    counters.clear()
    yield
    compiled.choose(False)


def switch(monkeypatch, backend="aot_eager"):
    compiled.choose(True)
    monkeypatch.setattr(compiled, "backend", backend or compiled.backend)


def n_compiled():
    return counters["stats"]["unique_graphs"]


def loss_and_gradients(gpt, rows, length):
    tokens = torch.randint(50, (rows, length + 1), generator=torch.Generator().manual_seed(length))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    loss = head_loss(gpt.hidden(inputs), gpt.head_weight, targets)
    trained = [p for p in gpt.parameters() if p.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, trained, allow_unused=True)]


def near(found, wanted, tolerance):
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(
                a, b, rtol=0, atol=tolerance * max(1.0, float(b.abs().max()))
            )


def agrees_on_ragged_batches(gpt, monkeypatch, backend, tolerance):
    """As many functions are compiled for the first batch as for all."""
    batches = [(4, 17), (3, 32), (2, 40), (5, 9), (32, 32), (7, 64)]
    plain = [loss_and_gradients(gpt, *sizes) for sizes in batches]
    switch(monkeypatch, backend)
    near(loss_and_gradients(gpt, *batches[0]), plain[0], tolerance)
    n = n_compiled()
    for sizes, wanted in zip(batches[1:], plain[1:]):
        near(loss_and_gradients(gpt, *sizes), wanted, tolerance)
    assert n_compiled() == n <= 3


@pytest.mark.slow
def test_a_compiled_model_has_the_loss_and_the_gradients_of_a_plain_one(monkeypatch):
    torch.manual_seed(0)
    agrees_on_ragged_batches(GPT2.build(), monkeypatch, "aot_eager", 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("sizes, n_frozen", [(GPT2, 0), (LLAMA, 2)], ids=["gpt2", "llama"])
def test_by_the_backend_that_is_here_too(sizes, n_frozen, monkeypatch):
    torch.manual_seed(0)
    gpt = sizes.build()
    freeze_layers(gpt, n_frozen)
    agrees_on_ragged_batches(gpt, monkeypatch, "", 1e-5)


def sampled(gpt, B, P, T):
    words = torch.randint(48, (B, P), generator=torch.Generator().manual_seed(P))
    mask = torch.arange(P) >= torch.arange(B)[:, None] % 3  # left-padded
    return generate(gpt, words, mask, T, (47,), 49, uniforms(1, 0, range(B), T))


def test_sampling_with_a_growing_cache_is_not_compiled(monkeypatch):
    """Its shapes change with every token."""
    gpt = GPT2.build().eval()
    switch(monkeypatch)
    sampled(gpt, 2, 5, 4)
    assert n_compiled() == 0


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", ""])
@pytest.mark.parametrize("sizes", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_a_static_cache_is_compiled_for_all_lengths_and_numbers_of_rows(
    sizes, backend, monkeypatch
):
    """As a GPU samples: a function reads prompts, one goes on by a token, and each has a case of
    its own where the whole cache is read."""
    monkeypatch.setattr(sampling, "is_static", lambda device: True)
    monkeypatch.setattr(sampling, "STRIDE", (16, 8))  # the cache is read to the next 8
    monkeypatch.setattr(sampling, "repeat", lambda step, n, device: [step() for _ in range(n)])
    torch.manual_seed(0)
    gpt, shapes = sizes.build().eval(), [(40, 7, 20), (3, 12, 30), (70, 5, 17), (2, 16, 9)]
    plain = [sampled(gpt, *shape) for shape in shapes]
    switch(monkeypatch, backend)
    for shape, tokens in zip(shapes, plain):
        assert sampled(gpt, *shape).equal(tokens)
    assert 2 <= n_compiled() <= 4


def test_the_backend_is_inductor_where_there_is_a_compiler(monkeypatch, capsys):
    for found, backend in (("/usr/bin/g++", "inductor"), (None, "aot_eager")):
        monkeypatch.setattr(shutil, "which", lambda name, found=found: found)
        compiled.choose(True)
        assert compiled.backend == backend and f"--compile: by {backend}" in capsys.readouterr().out
    compiled.choose(False)
    assert compiled.backend == ""


def test_a_function_that_is_compiled_for_ever_is_an_error_and_no_slow_run(monkeypatch):
    switch(monkeypatch)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 3)
    repeated = compiled.compiled(lambda x, word: x * len(word) + 1)
    with pytest.raises(FailOnRecompileLimitHit):
        for n in range(5):
            repeated(torch.ones(4), "a" * n)


def ends(cfg):
    return checkpoint.load(cfg.out_dir, prefer="latest").weights


@pytest.mark.slow
def test_the_four_stages_are_what_they_are_without_and_go_on_as_if_undisturbed(
    tmp_path, monkeypatch
):
    """With --check, which holds PPO's first ratio to 1; with frozen layers and the exact KL in the
    loss, with a critic of its own and text; resumed to the bit."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for stage, cfg in accidents.configs(tmp_path, tmp_path).items():
        cfg, main = replace(cfg, dtype="float32", check=True), accidents.STAGES[stage].main
        variants = [{}]
        if stage == "ppo":
            variants += [{"freeze_layers": 1, "kl_loss_coef": 0.1, "entropy_coef": 0.1}]
            variants += [{"critic": "separate", "reward": [f"{tmp_path}/rm"], "ptx_coef": 0.3}]
        for i, flags in enumerate(variants):
            plain = replace(cfg, **flags, out_dir=cfg.out_dir + "_" * i)
            fast = replace(plain, out_dir=f"{plain.out_dir}_compiled", compile=True)
            main(plain)
            main(fast)
            assert compiled.backend and n_compiled()
            for name, w in ends(plain).items():
                torch.testing.assert_close(ends(fast)[name], w, rtol=0, atol=1e-4, msg=name)
        cut = replace(cfg, out_dir=f"{cfg.out_dir}_cut", compile=True)
        accidents.end_by_signal(stage, cut, step=5)
        torch._dynamo.reset()  # as another process would begin
        main(replace(cut, resume=True))
        undisturbed = ends(replace(cfg, out_dir=f"{cfg.out_dir}_compiled"))
        assert all(torch.equal(w, undisturbed[name]) for name, w in ends(cut).items())
