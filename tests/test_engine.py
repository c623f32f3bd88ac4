"""engine.py: one optimizer step, the loop, exact resume."""

import csv
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanorlhf import engine
from nanorlhf.config import TrainConfig
from nanorlhf.data.batches import epoch_batch, split
from nanorlhf.engine import Optimizer, WeightedMean, cosine_rate, train_step
from nanorlhf.functional import lm_loss, masked_mean
from nanorlhf.machine.device import cast
from nanorlhf.model import GPT, ActorCritic, GPTConfig, RewardModel
from nanorlhf.run import checkpoint
from nanorlhf.tokenizer import byte_tokenizer
from tests.helpers import refused

torch.set_num_threads(1)  # toy products are no faster on two, and crawl on a busy machine
CPU, TOKENIZER = torch.device("cpu"), byte_tokenizer()
SIZES = GPTConfig(TOKENIZER.vocab_size, block_size=16, n_layer=1, n_head=2, d_model=8)


def make_config(tmp_path, **flags):
    defaults = {"device": "cpu", "dtype": "float32", "max_steps": 8, "batch_size": 4}
    defaults |= {"eval_every": 4, "save_every": 4, "warmup_steps": 2, "learning_rate": 1e-2}
    return TrainConfig(out_dir=str(tmp_path / "run"), **defaults | flags)


def make_gpt(seed=0):
    torch.manual_seed(seed)
    return GPT(SIZES)


def loss_fn(model, batch):
    inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
    return lm_loss(model(inputs), targets, batch["mask"][:, 1:]), {}


def make_batch(rows=6, seed=0):
    """Rows of random tokens, each with another number of positions in the loss."""
    rng = np.random.default_rng(seed)
    tokens = torch.from_numpy(rng.integers(0, 256, (rows, 12)))
    lengths = torch.from_numpy(np.append(rng.integers(3, 12, rows - 1), 2))
    mask = torch.arange(12) < lengths[:, None]
    weight = mask[:, 1:].sum(1).float()
    return {"tokens": tokens, "mask": mask, "weight": weight, "source": ["here"] * rows}


DATA = make_batch(20, seed=1)


def next_batch(step, seed=1):
    index = epoch_batch(20, 4, seed, step)
    return {k: [v[i] for i in index] if k == "source" else v[index] for k, v in DATA.items()}


def run(cfg, next_batch=next_batch, loss_fn=loss_fn, tokenizer=TOKENIZER, seed=0):
    """A tiny stage "gpt"; returns the trained model."""
    gpt = make_gpt(seed)
    engine.claim(cfg)
    val = [make_batch(5, seed=2)]
    engine.train("gpt", cfg, gpt, loss_fn, next_batch, val, tokenizer, cfg.max_steps)
    return gpt


def metrics_of(cfg):
    return Path(cfg.out_dir, "metrics.csv").read_bytes()


def step_folders(cfg):
    return sorted(p.name for p in Path(cfg.out_dir).iterdir() if p.is_dir())


# ---- one step ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grad_accum", [2, 3, 4, 6])
def test_accumulated_gradients_are_the_full_batchs(grad_accum, dtype, tmp_path):
    found = []
    for n in (1, grad_accum):
        cfg = make_config(tmp_path, grad_accum=n, grad_clip=1e9)
        model = make_gpt()
        optimizer = Optimizer(model, cfg, dtype, CPU)
        steps, step = [], optimizer.adamw.step
        keep = lambda o=optimizer, s=steps, f=step: (
            s.append(torch.cat([m.grad.flatten() for m in o.masters.values()])),
            f(),
        )
        optimizer.adamw.step = keep
        metrics = train_step(model, loss_fn, make_batch(), cfg, optimizer, 1e-3, CPU)
        found.append((steps[0], metrics["loss"], metrics["grad_norm"]))
    tolerance = 1e-6 if dtype == torch.float32 else 5e-3
    for a, b in zip(*found):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * a.abs().max().item())


def test_grad_checkpointing_reaches_every_gpt_that_is_trained(tmp_path):
    """A separate critic's as well; gradients are those without it, in both precisions."""
    for dtype in (torch.float32, torch.bfloat16):
        found = []
        for on in (False, True):
            policy = ActorCritic(make_gpt(), RewardModel(make_gpt(1)))
            cfg = make_config(tmp_path, grad_checkpointing=on)
            optimizer = Optimizer(policy, cfg, dtype, CPU)
            assert policy.gpt.grad_checkpointing is policy.critic.gpt.grad_checkpointing is on
            tokens = make_batch()["tokens"]
            states = torch.arange(3, tokens.shape[1] - 1).expand(len(tokens), -1)
            logits, values = policy({"tokens": tokens, "states": states})
            loss = logits.float().logsumexp(-1).mean() + values.mean()
            optimizer.backward(loss, {}, torch.ones(1))
            found.append([optimizer.masters[name].grad for name in optimizer.trained])
        assert all(torch.equal(a, b) for a, b in zip(*found))


def test_a_step_takes_the_mean_gradient_whatever_it_weighs_and_clips_it(tmp_path):
    """With a large eps AdamW's step is proportional to the gradient, and so tells its scale."""

    def moved(weights, grad_clip):
        gpt, batch = make_gpt(), make_batch()
        before = [p.detach().clone() for p in gpt.parameters()]
        cfg = make_config(tmp_path, grad_clip=grad_clip, weight_decay=0.0)
        optimizer = Optimizer(gpt, cfg, torch.float32, CPU, eps=1e3)
        for weight in weights:
            optimizer.backward(loss_fn(gpt, batch)[0], {}, torch.tensor([weight]))
        norm = optimizer.step(1.0)
        steps = [(p.detach() - b).flatten() for p, b in zip(gpt.parameters(), before)]
        return norm, torch.cat(steps).norm().item()

    norm, step = moved([1.0], 1e9)
    assert step == pytest.approx(norm / 1e3, rel=0.02)
    for weights in ([7.0], [3.0, 5.0]):
        assert moved(weights, 1e9) == pytest.approx((norm, step), rel=1e-3)
    for weights in ([1.0], [3.0, 5.0]):
        assert moved(weights, norm / 4) == pytest.approx((norm, step / 4), rel=1e-3)


def test_masked_means_are_what_weights_stand_for():
    """The weight of a row is its loss tokens, so sum(weight * row mean) is the batch's mean."""
    batch = make_batch()
    x = torch.rand(6, 12)
    rows = [masked_mean(x[i : i + 1], batch["mask"][i : i + 1]).item() for i in range(6)]
    weight = batch["mask"].sum(1)
    wanted = masked_mean(x, batch["mask"]).item()
    found = sum(r * w.item() for r, w in zip(rows, weight)) / weight.sum().item()
    assert math.isclose(found, wanted, rel_tol=1e-5)


def test_weight_decay_shrinks_matrices_only(tmp_path):
    model = make_gpt()
    for p in model.parameters():
        p.data += 0.5
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Optimizer(model, make_config(tmp_path, weight_decay=0.1), torch.float32, CPU)
    optimizer.backward(sum((p * 0).sum() for p in model.parameters()), {}, torch.ones(1))
    optimizer.step(0.1)
    for name, p in model.named_parameters():
        factor = 1 - 0.1 * 0.1 if p.dim() > 1 else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor)


def gradient_step(tmp_path, scale, clip, dtype=torch.float32):
    """(the gradient that AdamW sees, the norm reported) for a loss with gradient scale * 1."""
    model = make_gpt()
    optimizer = Optimizer(model, make_config(tmp_path, grad_clip=clip), dtype, CPU)
    seen = []
    optimizer.adamw.step = lambda: seen.extend(m.grad for m in optimizer.masters.values())
    optimizer.backward(sum((p * scale).sum() for p in model.parameters()), {}, torch.ones(1))
    norm = optimizer.step(0.1)
    return torch.cat([g.flatten() for g in seen]), norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_clipped_to_their_norm_and_the_norm_before_is_reported(tmp_path, dtype):
    free, norm = gradient_step(tmp_path, 0.5, 1e9, dtype)
    assert math.isclose(norm, free.norm().item(), rel_tol=1e-5) and (free == 0.5).all()
    clipped, norm = gradient_step(tmp_path, 0.5, 1.0, dtype)
    assert math.isclose(norm, free.norm().item(), rel_tol=1e-5)
    assert math.isclose(clipped.norm().item(), 1.0, rel_tol=1e-4)
    small, _ = gradient_step(tmp_path, 1e-4, 1.0, dtype)
    torch.testing.assert_close(small, torch.full_like(small, 1e-4), rtol=0.01, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path, bad, dtype):
    model = make_gpt()
    optimizer = Optimizer(model, make_config(tmp_path), dtype, CPU)
    optimizer.backward(model.ln_f.weight.float().sum(), {}, torch.ones(1))
    optimizer.step(1e-3)
    before = {name: w.clone() for name, w in optimizer.weights().items()}
    optimizer.backward(model.ln_f.weight.float().sum() * bad, {}, torch.ones(1))
    assert not math.isfinite(optimizer.step(1e-3))
    assert all(torch.equal(before[name], w) for name, w in optimizer.weights().items())
    optimizer.backward(
        model.ln_f.weight.float().sum(), {}, torch.ones(1)
    )  # and nothing of it is left behind
    assert math.isclose(optimizer.step(1e-3), math.sqrt(8), rel_tol=1e-5)


def test_masters_keep_updates_smaller_than_bfloat16s_spacing(tmp_path):
    model = make_gpt()
    optimizer = Optimizer(model, make_config(tmp_path, weight_decay=0.0), torch.bfloat16, CPU)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(w.dtype == torch.float32 for w in optimizer.weights().values())
    for i in range(40):  # 1 - 1e-4 rounds to 1 in bfloat16, 1 - 40e-4 does not
        optimizer.backward(model.ln_f.weight.float().sum(), {}, torch.ones(1))
        optimizer.step(1e-4)
        moved = (model.ln_f.weight != 1).all()
        assert moved == (i + 1 >= 20) or 15 < i < 25
    wanted = torch.full((8,), 1 - 40e-4)
    torch.testing.assert_close(optimizer.masters["ln_f.weight"].detach(), wanted, rtol=1e-4, atol=0)
    assert torch.equal(model.ln_f.weight, wanted.bfloat16())


def test_masters_are_float32_whatever_the_model_arrives_in(tmp_path):
    """As a critic copied from a reward model that scores in bfloat16 does."""
    model = cast(make_gpt(), torch.bfloat16, CPU)
    optimizer = Optimizer(model, make_config(tmp_path), torch.bfloat16, CPU)
    assert all(w.dtype == torch.float32 for w in optimizer.masters.values())
    optimizer.backward(model.ln_f.weight.float().sum(), {}, torch.ones(1))
    optimizer.step(1e-4)
    assert (optimizer.masters["ln_f.weight"] != 1).all()


def test_frozen_parameters_are_neither_trained_nor_decayed(tmp_path):
    model = make_gpt()
    model.wte.requires_grad_(False)
    before = model.wte.weight.clone()
    cfg = make_config(tmp_path)
    optimizer = Optimizer(model, cfg, torch.float32, CPU)
    train_step(model, loss_fn, make_batch(), cfg, optimizer, 0.1, CPU)
    assert torch.equal(model.wte.weight, before) and "wte.weight" not in optimizer.trained


def test_discarded_gradients_leave_no_trace(tmp_path):
    optimizer = Optimizer(make_gpt(), make_config(tmp_path), torch.bfloat16, CPU)
    optimizer.backward(optimizer.model.ln_f.weight.float().sum() * 100, {}, torch.tensor([7.0]))
    optimizer.discard()
    optimizer.backward(optimizer.model.ln_f.weight.float().sum(), {}, torch.tensor([2.0]))
    assert math.isclose(optimizer.step(1e-3), math.sqrt(8), rel_tol=1e-5)


def test_warm_up_rises_to_the_peak_and_the_cosine_falls_to_a_tenth(tmp_path):
    cfg = make_config(tmp_path, warmup_steps=10, learning_rate=2.0)
    rates = [cosine_rate(step, cfg, 100) for step in range(101)]
    assert rates[0] == 0.2 and rates[9] == rates[10] == 2.0
    assert math.isclose(rates[55], 1.1) and math.isclose(rates[100], 0.2)
    assert all(a < b for a, b in zip(rates[:9], rates[1:10]))
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))
    assert cosine_rate(0, make_config(tmp_path, warmup_steps=0), 100) == 1e-2
    assert math.isclose(cosine_rate(500, cfg, 100), 0.2)


# ---- the loop ----------------------------------------------------------------------------------


def interrupt_at(step):
    def batches(s):
        if s == step:
            raise KeyboardInterrupt
        return next_batch(s)

    return batches


def test_no_batch_is_made_that_no_step_needs(tmp_path):
    asked = []
    cfg = make_config(tmp_path, max_steps=3)
    run(cfg, lambda step: asked.append(step) or next_batch(step))
    assert set(asked) == {0, 1, 2}


@pytest.mark.parametrize("flags", [{}, {"dtype": "bfloat16"}, {"grad_accum": 2}], ids=str)
@pytest.mark.parametrize("stop", [5, 7])
def test_an_interrupted_run_that_resumes_is_the_uninterrupted_one(tmp_path, flags, stop):
    whole = make_config(tmp_path / "a", max_steps=10, **flags)
    wanted = run(whole)
    cfg = make_config(tmp_path / "b", max_steps=10, **flags)
    with pytest.raises(KeyboardInterrupt):
        run(cfg, interrupt_at(stop))
    cfg.resume = True
    found = run(cfg, seed=9)  # other initial weights: all must come from the checkpoint
    assert metrics_of(cfg) == metrics_of(whole)
    for (name, p), q in zip(wanted.named_parameters(), found.parameters()):
        assert torch.equal(p, q), name
    a, b = [checkpoint.load(c.out_dir, "lm", "latest") for c in (whole, cfg)]
    assert a.step == b.step == 10
    assert all(torch.equal(w, b.weights[name]) for name, w in a.weights.items())


def test_a_finished_run_goes_on_from_its_end(tmp_path):
    """The learning rate apart, which depends on the number of steps planned."""
    cfg = make_config(tmp_path, max_steps=4)
    run(cfg)
    cfg.max_steps, cfg.resume = 8, True
    run(cfg, seed=9)
    rows = list(csv.DictReader(Path(cfg.out_dir, "metrics.csv").open()))
    assert [int(r["step"]) for r in rows] == list(range(9))
    assert all(r["loss"] for r in rows[:-1])
    assert checkpoint.load(cfg.out_dir, "lm", "latest").step == 8


def test_metrics_csv_has_one_header_and_blank_cells_and_no_clock(tmp_path):
    cfg = make_config(tmp_path, eval_every=4, max_steps=10)
    run(cfg)
    rows = list(csv.reader(Path(cfg.out_dir, "metrics.csv").open()))
    assert rows[0] == ["step", "loss", "learning_rate", "grad_norm", "val_loss", "val_weight"]
    assert all(len(row) == 6 for row in rows)
    assert [r[0] for r in rows[1:]] == [str(i) for i in range(11)]
    assert [i for i, r in enumerate(rows[1:]) if r[4]] == [0, 4, 8, 10]
    assert rows[-1][1:4] == ["", "", ""]
    timing = list(csv.reader(Path(cfg.out_dir, "timing.csv").open()))
    assert timing[0] == ["step", "seconds"] and len(timing) == len(rows)
    first = metrics_of(cfg)
    run(cfg)
    assert metrics_of(cfg) == first


def test_training_lowers_the_loss_and_evaluation_weighs_by_tokens(tmp_path):
    cfg = make_config(tmp_path, max_steps=30, learning_rate=3e-2)
    run(cfg)
    rows = list(csv.DictReader(Path(cfg.out_dir, "metrics.csv").open()))
    assert float(rows[-2]["loss"]) < 0.8 * float(rows[0]["loss"])
    model, batch = make_gpt(), make_batch(5, seed=2)
    parts = list(split(batch, 5))
    whole, _ = loss_fn(model, batch)
    found = engine.evaluate(model, loss_fn, parts, cfg, CPU)["loss"]
    assert math.isclose(found, whole.item(), rel_tol=1e-5)


def bad_loss(model, batch):
    loss, metrics = loss_fn(model, batch)
    return loss * math.nan if batch["source"][0] == "rotten.txt:7" else loss, metrics


def test_a_loss_that_is_not_finite_stops_names_step_and_source_and_keeps_the_last(tmp_path, capsys):
    cfg = make_config(tmp_path)
    rotten = lambda s: next_batch(s) | ({"source": ["rotten.txt:7"] * 4} if s == 6 else {})
    said = refused(capsys, run, cfg, rotten, bad_loss)
    assert "step 6" in said and "rotten.txt:7" in said and "last checkpoint is kept" in said
    assert checkpoint.load(cfg.out_dir, "lm").step == 4


def test_an_out_dir_that_cannot_be_made_exits_2(tmp_path, capsys):
    (tmp_path / "run").write_text("a file")
    assert "--out_dir" in refused(capsys, run, make_config(tmp_path))


def test_metrics_of_micro_batches_are_weighted():
    mean = WeightedMean()
    mean.add({"loss": 1.0}, 3)
    mean.add({"loss": torch.tensor(5.0)}, 1)
    assert mean.result() == {"loss": 2.0}
    assert WeightedMean().result() == {}


def test_a_metric_that_some_micro_batches_lack_is_averaged_over_all_of_them():
    mean = WeightedMean()
    mean.add({"loss": 1.0}, 3)
    mean.add({"accuracy": 1.0, "loss": torch.tensor(5.0)}, 1)
    assert mean.result(norm=torch.tensor(2.5)) == {"loss": 2.0, "accuracy": 0.25}
    assert (mean.norm, mean.total) == (2.5, 4)


class Counted(TorchDispatchMode):
    """Counts what is asked of the device; a new tensor without contents asks nothing."""

    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += "empty_like" not in str(function) and "detach" not in str(function)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_costs_a_few_operators_however_many_parameters_there_are(dtype, tmp_path):
    counts = []
    for n_layer in (1, 6):
        gpt = GPT(replace(SIZES, n_layer=n_layer))
        optimizer = Optimizer(gpt, make_config(tmp_path), dtype, CPU)

        done = SimpleNamespace(backward=lambda: None)
        for _ in range(2):  # AdamW's first step makes its moments
            counted = Counted()
            for _ in range(3):
                for p in gpt.parameters():
                    p.grad = torch.ones_like(p)  # what the backward pass leaves
                with counted:
                    optimizer.mean.add({"loss": 1.0, "accuracy": 0.5}, 2.0)
                    optimizer._accumulate(done)
            with counted:
                optimizer.step(1e-3)
        counts.append(counted.n)
    assert counts[0] == counts[1] < 60


def test_the_device_is_waited_for_once_a_step(tmp_path, monkeypatch):
    """Where stats are asked for, which are read with the gradient's norm."""
    gpt, waits = make_gpt(), []
    optimizer = Optimizer(gpt, make_config(tmp_path), torch.float32, CPU)
    optimizer.backward(*loss_fn(gpt, make_batch()), torch.ones(6))
    optimizer.mean.add_beside({"loss": 1.0})
    for name in ("tolist", "item", "__float__", "__int__", "__bool__", "cpu", "numpy"):
        real = getattr(torch.Tensor, name)
        wait = lambda x, *args, real=real, name=name: waits.append(name) or real(x, *args)
        monkeypatch.setattr(torch.Tensor, name, wait)
    stats = optimizer.stats()
    assert optimizer.step(1e-3) > 0 and waits == ["tolist"]
    assert stats == {"loss": 1.0}


def test_a_micro_batch_after_the_stats_of_its_step_is_a_mistake(tmp_path):
    gpt = make_gpt()
    optimizer = Optimizer(gpt, make_config(tmp_path), torch.float32, CPU)
    for end in (lambda: optimizer.step(1e-3), optimizer.discard):
        optimizer.backward(*loss_fn(gpt, make_batch()), torch.ones(6))
        optimizer.stats()
        with pytest.raises(AssertionError, match="before `step`"):
            optimizer.backward(*loss_fn(gpt, make_batch()), torch.ones(6))
        end()
    optimizer.backward(*loss_fn(gpt, make_batch()), torch.ones(6))
