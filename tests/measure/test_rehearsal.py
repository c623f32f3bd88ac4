"""A rehearsal of a stage on tensors without contents takes the memory of the stage."""

import dataclasses

import pytest

from nanorlhf.llama import LlamaConfig
from nanorlhf.measure.rehearsal import predict
from nanorlhf.model import GPT
from tests.tools.test_memory import SIZES, STAGES, config, peak


@pytest.mark.parametrize("dtype, each", [("float32", 12), ("bfloat16", 14)])
def test_weights_and_optimizer_are_what_arithmetic_says(dtype, each):
    """Weights and two moments in float32; with bfloat16 also the copy that computes."""
    n = sum(p.numel() for p in GPT(SIZES).parameters())
    tensors = len(list(GPT(SIZES).parameters()))
    fixed = predict(config(dtype=dtype), "sft", SIZES)["fixed"]
    assert n * each <= fixed <= n * each + tensors * 5 * 512  # rounding, and AdamW's step counts
    n_upper = sum(p.numel() for p in GPT(SIZES).h[1].parameters())
    width = 4 if dtype == "float32" else 2
    with_ppo = lambda **flags: predict(config(dtype=dtype, **flags), "ppo", SIZES)["fixed"]
    assert with_ppo() == pytest.approx(n * (each + 2 * width), rel=0.2)  # reference, reward model
    saved = with_ppo() - with_ppo(freeze_layers=1)  # the reference's lower part, and its moments
    assert saved == pytest.approx((n - n_upper) * (width + 8), rel=0.2)
    more = with_ppo(critic="separate") - with_ppo()
    assert more == pytest.approx(n * each, rel=0.2)


@pytest.mark.parametrize("stage", STAGES)
def test_what_should_save_memory_does_and_longer_takes_more(stage):
    deep = dataclasses.replace(SIZES, n_layer=4)
    device, dtype = ("cpu", "bfloat16") if stage in ("gpt", "ppo") else ("cuda", "float32")
    of = lambda **flags: peak(stage, deep, dtype=dtype, device=device, minibatch_size=16, **flags)
    plain = of(batch_size=16)
    assert of(batch_size=16, grad_accum=4) < plain
    assert of(batch_size=16, grad_checkpointing=True) < plain
    if stage != "gpt":  # which reads windows of block_size
        assert of(batch_size=16, max_new_tokens=40) > plain


def test_a_gpus_attention_holds_no_scores_of_a_llama():
    """A text twice as long takes twice the memory in the gradient step, and not four times."""
    gpt = dataclasses.replace(SIZES, vocab_size=8, block_size=2048, n_layer=1)
    llama = LlamaConfig(**vars(gpt) | {"n_kv_head": 1, "d_head": 16})
    for sizes in (gpt, llama):
        cfg = lambda T, sizes=sizes: config(
            device="cuda", dtype="bfloat16", batch_size=4, max_new_tokens=T
        )
        short, long = (predict(cfg(T), "rm", sizes) for T in (500, 1000))
        held = lambda found: found["peak"] - found["fixed"]
        assert held(long) < 2.2 * held(short)


def test_ppos_rollout_holds_the_cache_twice_when_rows_leave():
    sizes = dataclasses.replace(SIZES, vocab_size=8, block_size=512, d_model=128)
    flags = {"batch_size": 64, "minibatch_size": 1, "prompt_tokens": 200, "max_new_tokens": 57}
    peaks = predict(config(**flags), "ppo", sizes)["peaks"]
    cache = lambda positions: 2 * 2 * 64 * 128 * positions * 4  # K and V, blocks, rows, width
    assert peaks["rollout"] > 1.75 * cache(257)
    assert peaks["rollout"] - peaks["update"] < 4 * cache(257)
