"""tools/memory.py: what is counted is what is there, and the advice is true."""

import dataclasses
import gc
import json

import pytest
import torch

from nanorlhf.measure.rehearsal import BATCH_SIZE, META, predict
from nanorlhf.measure.tracker import Heap, Tracker
from nanorlhf.model import GPT, GPTConfig
from nanorlhf.tools import memory

SIZES = GPTConfig(300, block_size=64, n_layer=2, n_head=2, d_model=32)
STAGES = tuple(BATCH_SIZE)
KB = 2**10


def config(**flags):
    small = {"device": "cuda", "dtype": "float32", "memory_gb": 1.0, "batch_size": 8}
    small |= {"prompt_tokens": 16, "max_new_tokens": 24, "minibatch_size": 8, "eval_prompts": 8}
    return memory.Config(**small | flags)


def peak(stage, sizes=SIZES, **flags):
    return predict(config(**flags), stage, sizes)["peak"]


# ---- counting ----------------------------------------------------------------------------------


def test_the_tracker_counts_storages_once_and_until_they_die():
    with META, Tracker(heap=False) as tracker:
        a = torch.zeros(4, 256)
        assert tracker.live == 4 * KB
        b = a.view(256, 4)[3:].t()
        assert tracker.live == 4 * KB
        del a
        assert tracker.live == 4 * KB  # b needs it
        c = b.contiguous().add_(1)
        assert tracker.live == 4 * KB + 4 * KB  # 253 * 16 bytes, rounded up to 512
        del b
        assert tracker.live == 4 * KB
        (c * 2).sum()
        assert tracker.live == 4 * KB
        assert tracker.peaks == {"start": 4 * KB + 4 * KB + 512}


def test_the_tracker_counts_what_backward_needs_and_frees_it():
    with META, Tracker(heap=False) as tracker:
        x = torch.zeros(256, 4, requires_grad=True)
        y = x.exp().exp().sum()
        assert tracker.live == 3 * 4 * KB + 512  # x, and both results, which exp's backward needs
        y.backward()
        assert tracker.live == 2 * 4 * KB + 512  # x and its gradient
        assert x.grad.shape == x.shape


def test_calls_that_are_remembered_give_the_shapes_of_those_that_are_made():
    with META, Tracker(heap=False) as tracker:
        for _ in range(2):
            x = torch.zeros(3, 5, 7)
            assert (x.transpose(1, 2) + 1).shape == (3, 7, 5)
            assert torch.cat([x, x], 1).shape == (3, 10, 7) and x.softmax(-1).stride() == x.stride()
            assert [t.shape for t in x.max(1)] == [(3, 7), (3, 7)] and x.max(1)[
                1
            ].dtype == torch.long
            assert x.bfloat16().dtype == torch.bfloat16 and x.float() is x
            assert x[torch.ones(3, 5, dtype=torch.bool)].shape == (15, 7)
            known = len(tracker.known)
        assert len(tracker.known) == known > 5


def test_the_tracker_agrees_with_a_real_model():
    """Tensors that really exist, found by the garbage collector, against those that do not."""
    real = GPT(SIZES)
    kept = []
    save = lambda x: kept.append(x) or x
    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        loss = real(torch.zeros(4, 20, dtype=torch.long)).sum()
    gc.collect()
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in kept}
    for p in real.parameters():
        storages[p.untyped_storage()._cdata] = p.nbytes
    with META, Tracker(heap=False) as tracker:
        model = GPT(SIZES)
        found = model(torch.zeros(4, 20, dtype=torch.long)).sum()
        grown = tracker.live
    assert loss.shape == found.shape
    assert sum(storages.values()) == pytest.approx(grown, rel=0.1)  # rounding and attention


def test_the_heap_fills_holes_and_keeps_what_it_cannot_fill():
    heap = Heap()
    begin = heap.top
    a, b, c = (heap.take(size) - begin for size in (100, 50, 10))
    assert (a, b, c, heap.top - begin) == (0, 100, 150, 160)
    heap.give(begin + a, 100)
    heap.give(begin + b, 50)
    assert heap.take(40) == begin + 100  # the smallest hole that holds it
    assert heap.take(100) == begin and heap.top == begin + 160
    assert heap.take(20) == begin + 160  # the 10 that are left of b do not do
    heap.give(begin + 160, 20)
    assert heap.top == begin + 160
    assert heap.take(10) == begin + 140


# ---- prediction --------------------------------------------------------------------------------


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


def test_ppos_rollout_holds_the_cache_twice_when_rows_leave():
    sizes = dataclasses.replace(SIZES, vocab_size=8, block_size=512, d_model=128)
    flags = {"batch_size": 64, "minibatch_size": 1, "prompt_tokens": 200, "max_new_tokens": 57}
    peaks = predict(config(**flags), "ppo", sizes)["peaks"]
    cache = lambda positions: 2 * 2 * 64 * 128 * positions * 4  # K and V, blocks, rows, width
    assert peaks["rollout"] > 1.75 * cache(257)
    assert peaks["rollout"] - peaks["update"] < 4 * cache(257)


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_advice_makes_it_fit_and_says_nothing_needless(stage):
    cfg = config(batch_size=16, minibatch_size=16)
    before = peak(stage, batch_size=16, minibatch_size=16)
    flags, after = memory.make_fit(cfg, stage, SIZES, 0.6 * before)
    assert flags and after <= 0.6 * before
    assert predict(dataclasses.replace(cfg, **flags), stage, SIZES)["peak"] == after
    for name in flags:
        fewer = {k: v for k, v in flags.items() if k != name}
        assert predict(dataclasses.replace(cfg, **fewer), stage, SIZES)["peak"] > 0.6 * before


# ---- the command -------------------------------------------------------------------------------


def test_the_defaults_are_the_scripts():
    import train_gpt
    import train_ppo
    import train_rm
    import train_sft

    for stage, script in zip(STAGES, (train_gpt, train_sft, train_rm, train_ppo)):
        theirs = script.Config()
        assert BATCH_SIZE[stage] == theirs.batch_size
        for field in dataclasses.fields(memory.Config):
            only_here = field.name in ("init", "batch_size")
            if field.name in theirs.__dataclass_fields__ and not only_here:
                assert getattr(memory.Config(), field.name) == getattr(theirs, field.name)


def test_the_command_prints_a_row_per_stage_and_flags_to_type(tmp_path, capsys):
    (tmp_path / "weights.pt").touch()
    (tmp_path / "config.json").write_text(json.dumps({"model": dataclasses.asdict(SIZES)}))
    cfg = config(init=str(tmp_path), memory_gb=0.0025, stages=["gpt", "sft"])
    advice = memory.main(cfg)
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.split(" ")[0] in STAGES]
    assert len(rows) == 2 and advice
    assert {row.split()[0] for row in rows if "does not fit" in row} == {s for s, *_ in advice}
    for stage, flags, peak in advice:
        (line,) = [line for line in lines if line.startswith(f"train_{stage}.py")]
        assert ("fits with" in line) == (peak <= memory.USABLE * 0.0025 * 2**30)
        assert all(f"--{name}" in line for name in flags)


@pytest.mark.parametrize(
    "flags, named",
    [
        ({"init": "nowhere"}, "nowhere"),
        ({"grad_accum": 0}, "--grad_accum"),
        ({"batch_size": -1}, "--batch_size"),
        ({"stages": []}, "--stages"),
        ({"max_new_tokens": 1020}, "1024 tokens"),
        ({"freeze_layers": 13}, "12 blocks"),
    ],
)
def test_bad_input_exits_2(flags, named, capsys):
    with pytest.raises(SystemExit) as stop:
        memory.main(config(**{"init": "gpt2"} | flags))
    assert stop.value.code == 2
    assert named in capsys.readouterr().err
