"""engine.py and checkpoint.py: one optimizer step, the loop, exact resume, whole checkpoints."""

import contextlib
import csv
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from nanorlhf import engine, report
from nanorlhf.config import TrainConfig
from nanorlhf.data.batches import epoch_batch, split
from nanorlhf.engine import Optimizer, WeightedMean, cosine, train_step
from nanorlhf.functional import lm_loss, masked_mean
from nanorlhf.machine.device import cast, pick_device, pick_dtype
from nanorlhf.model import GPT, ActorCritic, GPTConfig, RewardModel
from nanorlhf.run import checkpoint
from nanorlhf.tokenizer import byte_tokenizer, train_bpe

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


def dies(capsys, *words):
    """A context for what must end with status 2; afterwards, one line on stderr with the words."""

    class Context:
        def __enter__(self):
            capsys.readouterr()

        def __exit__(self, kind, error, _):
            assert issubclass(kind, SystemExit) and error.code == 2, f"{kind} {error}"
            lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
            assert len(lines) == 1 and all(w in lines[0] for w in words), f"{lines} {words}"
            return True

    return Context()


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


def test_metrics_of_micro_batches_are_weighted():
    mean = WeightedMean()
    mean.add({"loss": 1.0}, 3)
    mean.add({"loss": torch.tensor(5.0)}, 1)
    assert mean.result() == {"loss": 2.0}
    assert WeightedMean().result() == {}


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
    rates = [cosine(step, cfg, 100) for step in range(101)]
    assert rates[0] == 0.2 and rates[9] == rates[10] == 2.0
    assert math.isclose(rates[55], 1.1) and math.isclose(rates[100], 0.2)
    assert all(a < b for a, b in zip(rates[:9], rates[1:10]))
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))
    assert cosine(0, make_config(tmp_path, warmup_steps=0), 100) == 1e-2
    assert math.isclose(cosine(500, cfg, 100), 0.2)


# ---- device and precision ----------------------------------------------------------------------


def test_an_explicit_dtype_is_taken_and_auto_is_one_of_the_two(tmp_path):
    for name in ("float32", "bfloat16"):
        assert pick_dtype(make_config(tmp_path, dtype=name), CPU) == getattr(torch, name)
    auto = pick_dtype(make_config(tmp_path, dtype="auto"), CPU)
    assert auto in (torch.float32, torch.bfloat16)
    assert pick_dtype(make_config(tmp_path, dtype="auto"), torch.device("mps")) == torch.float32


@pytest.mark.parametrize("name", ["tpu", "cuda:77", "nonsense"])
def test_a_device_that_is_not_there_exits_2(tmp_path, capsys, name):
    with dies(capsys, f"--device {name}: "):
        pick_device(make_config(tmp_path, device=name))
    assert pick_device(make_config(tmp_path)) == CPU


def test_cast_leaves_buffers_in_float32():
    model = cast(RewardModel(make_gpt()), torch.bfloat16, CPU)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert model.score_mean.dtype == model.score_sd.dtype == torch.float32


# ---- the loop ----------------------------------------------------------------------------------


def interrupt_at(step):
    def batches(s):
        if s == step:
            raise KeyboardInterrupt
        return next_batch(s)

    return batches


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
    cfg.max_steps, cfg.resume, cfg.resume_anyway = 8, True, True
    run(cfg, seed=9)
    rows = list(csv.DictReader(Path(cfg.out_dir, "metrics.csv").open()))
    assert [int(r["step"]) for r in rows] == list(range(9))
    assert all(r["loss"] for r in rows[:-1])
    assert checkpoint.load(cfg.out_dir, "lm", "latest").step == 8


def test_metrics_csv_has_one_header_and_blank_cells_and_no_clock(tmp_path):
    cfg = make_config(tmp_path, eval_every=4, max_steps=10)
    run(cfg)
    rows = list(csv.reader(Path(cfg.out_dir, "metrics.csv").open()))
    assert rows[0] == ["step", "loss", "learning_rate", "grad_norm", "val_loss"]
    assert all(len(row) == 5 for row in rows)
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
    with dies(capsys, "step 6", "rotten.txt:7", "last checkpoint is kept"):
        run(cfg, rotten, bad_loss)
    assert checkpoint.load(cfg.out_dir, "lm").step == 4


# ---- checkpoints -------------------------------------------------------------------------------


def save(cfg, step, gpt=None, first=False, best=False, stage="gpt", tokenizer=TOKENIZER):
    weights = (gpt or make_gpt(step)).state_dict()
    Path(cfg.out_dir).mkdir(exist_ok=True)
    checkpoint.save(cfg, stage, step, weights, {"x": step}, tokenizer, SIZES, first, best)


def test_weights_that_a_model_has_taken_are_not_kept_a_second_time(tmp_path):
    cfg = make_config(tmp_path)
    save(cfg, 1, RewardModel(make_gpt()), stage="rm")
    assert checkpoint.load_reward_model(cfg.out_dir)[1].weights == {}
    save(cfg, 2, ActorCritic(make_gpt()), stage="ppo")
    assert checkpoint.load_gpt(cfg.out_dir)[1].weights == {}


def test_a_saved_model_loads_as_it_was(tmp_path):
    cfg, gpt = make_config(tmp_path), make_gpt()
    save(cfg, 3, gpt, best=True)
    for folder in (cfg.out_dir, Path(cfg.out_dir, "step_3")):
        found, about = checkpoint.load_gpt(folder)
        assert (about.stage, about.step, about.model_config) == ("gpt", 3, SIZES)
        assert about.tokenizer == TOKENIZER and about.config["flags"]["max_steps"] == 8
        assert all(torch.equal(a, b) for a, b in zip(gpt.parameters(), found.parameters()))
    names = {p.name for p in Path(cfg.out_dir, "step_3").iterdir()}
    assert names == {"weights.pt", "state.pt", "tokenizer.json", "config.json", "SHA256SUMS"}


def test_latest_and_best_point_where_they_say_and_others_are_removed(tmp_path):
    cfg = make_config(tmp_path)
    for step, best in ((1, True), (2, True), (3, False), (4, False)):
        save(cfg, step, best=best)
    assert step_folders(cfg) == ["step_2", "step_4"]
    assert checkpoint.find(cfg.out_dir).name == "step_2"
    assert checkpoint.find(cfg.out_dir, "latest").name == "step_4"
    save(cfg, 5, best=True)
    assert step_folders(cfg) == ["step_5"]
    assert checkpoint.find(tmp_path / "nowhere") is None


def test_without_a_best_the_latest_is_found(tmp_path):
    cfg = make_config(tmp_path)
    save(cfg, 1, first=True)
    save(cfg, 2)
    assert checkpoint.find(cfg.out_dir).name == "step_2"


def test_best_is_the_checkpoint_with_the_lowest_validation_loss(tmp_path):
    losses = iter([5.0, 3.0, 4.0, 3.5])  # at steps 0, 2, 4, 6
    cfg = make_config(tmp_path, max_steps=6, eval_every=2, save_every=2)

    def staged(model, batch):
        loss, metrics = loss_fn(model, batch)
        return (loss, metrics) if model.training else (loss * 0 + next(losses), metrics)

    run(cfg, loss_fn=staged)
    assert step_folders(cfg) == ["step_2", "step_6"]
    assert checkpoint.find(cfg.out_dir, "best").name == "step_2"


def test_a_new_run_keeps_the_old_checkpoint_until_its_first_save(tmp_path, capsys):
    cfg = make_config(tmp_path)
    run(cfg)
    old = checkpoint.load(cfg.out_dir, "lm", "latest")
    capsys.readouterr()
    with pytest.raises(KeyboardInterrupt):
        run(cfg, interrupt_at(3), seed=5)
    assert "holds an earlier run" in capsys.readouterr().out
    kept = checkpoint.load(cfg.out_dir, "lm", "latest")
    assert kept.step == 8 and torch.equal(kept.weights["wte.weight"], old.weights["wte.weight"])
    with pytest.raises(KeyboardInterrupt):
        run(cfg, interrupt_at(5), seed=5)
    assert step_folders(cfg) == ["step_4"]  # its own first one: nothing of the old run is left
    assert checkpoint.load(cfg.out_dir, "lm").step == 4


def test_a_new_run_without_a_best_of_its_own_drops_the_old_best(tmp_path):
    cfg = make_config(tmp_path)
    save(cfg, 7, best=True)
    save(cfg, 1, first=True)
    assert checkpoint.find(cfg.out_dir).name == "step_1" and step_folders(cfg) == ["step_1"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("disk\nx")])
@pytest.mark.parametrize("step", [8, 4])
def test_a_save_that_fails_keeps_the_previous_checkpoint(
    tmp_path, monkeypatch, capsys, error, step
):
    cfg = make_config(tmp_path)
    save(cfg, 4, best=True)
    wanted = make_gpt(4).state_dict()

    def full_disk(x, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", full_disk)
    with dies(capsys, f"step_{step}", "could not be written", "last good checkpoint is kept"):
        save(cfg, step, make_gpt(8), best=True)
    found = checkpoint.load(cfg.out_dir, "lm")
    assert found.step == 4 and step_folders(cfg) == ["step_4"]
    assert all(torch.equal(w, found.weights[name]) for name, w in wanted.items())


def test_a_save_that_was_killed_half_way_is_never_found(tmp_path):
    cfg = make_config(tmp_path)
    save(cfg, 4)
    Path(cfg.out_dir, ".step_8.partial").mkdir()
    Path(cfg.out_dir, ".step_8.partial", "weights.pt").write_bytes(b"half")
    assert checkpoint.load(cfg.out_dir, "lm").step == 4
    save(cfg, 12)
    assert step_folders(cfg) == ["step_12"]


@pytest.mark.parametrize("step", [4, 8])
@pytest.mark.parametrize("done", range(4))
def test_a_save_killed_between_any_two_of_its_moves_leaves_a_whole_checkpoint(
    tmp_path, monkeypatch, step, done
):
    cfg, moves = make_config(tmp_path), []
    save(cfg, 4, make_gpt(4), best=True)

    def until_killed(move):
        def moved(*args):
            if len(moves) == done:
                raise KeyboardInterrupt
            moves.append(args)
            return move(*args)

        return moved

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", until_killed(Path.rename))
        patch.setattr(os, "replace", until_killed(os.replace))
        with contextlib.suppress(KeyboardInterrupt):
            save(cfg, step, make_gpt(8), best=True)
    for prefer in ("latest", "best"):
        found = checkpoint.load(cfg.out_dir, "lm", prefer).weights
        assert any(
            all(torch.equal(w, found[name]) for name, w in make_gpt(seed).state_dict().items())
            for seed in (4, 8)
        )
    save(cfg, 12, best=True)
    assert step_folders(cfg) == ["step_12"]


def test_a_checkpoint_that_cannot_be_used_exits_2_with_its_reason(tmp_path, capsys):
    cfg = make_config(tmp_path)
    with dies(capsys, "no checkpoint there"):
        checkpoint.load(cfg.out_dir)
    save(cfg, 1)
    folder = Path(cfg.out_dir, "step_1")
    (folder / "SHA256SUMS").unlink()  # which would tell first
    whole = (folder / "weights.pt").read_bytes()
    for broken in (b"", b"half", whole[: len(whole) // 2]):
        (folder / "weights.pt").write_bytes(broken)
        with dies(capsys, "step_1", "not a whole"):
            checkpoint.load_gpt(cfg.out_dir)
    (folder / "weights.pt").write_bytes(whole)
    for name in ("config.json", "tokenizer.json"):
        text = (folder / name).read_text()
        for broken in ("{", "{}", "[]"):
            (folder / name).write_text(broken)
            with dies(capsys, "step_1", "not a whole"):
                checkpoint.load_gpt(cfg.out_dir)
        (folder / name).write_text(text)
    (folder / "weights.pt").unlink()
    with dies(capsys, "step_1", "not a whole"):
        checkpoint.load_gpt(cfg.out_dir)


@pytest.mark.parametrize("name", ["weights.pt", "config.json", "tokenizer.json"])
def test_one_flipped_bit_or_a_missing_file_is_noticed_and_named(tmp_path, capsys, name):
    cfg = make_config(tmp_path)
    save(cfg, 1)
    path = Path(cfg.out_dir, "step_1", name)
    whole = bytearray(path.read_bytes())
    for place in (0, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        flipped = whole.copy()
        flipped[place] ^= 4
        path.write_bytes(flipped)
        with dies(capsys, "step_1", f"{name} is damaged"):
            checkpoint.load_gpt(cfg.out_dir)
    path.unlink()
    with dies(capsys, "step_1", f"{name} is missing"):
        checkpoint.load_gpt(cfg.out_dir)
    path.write_bytes(whole)
    checkpoint.load_gpt(cfg.out_dir)


def test_weights_that_do_not_fit_exit_2_and_name_the_tensor(tmp_path, capsys):
    weights = make_gpt().state_dict()
    cases = {
        "ln_f.bias": {k: w for k, w in weights.items() if k != "ln_f.bias"},
        "wpe.weight": weights | {"wpe.weight": torch.zeros(3, 3)},
        "lm_head.weight": weights | {"lm_head.weight": torch.zeros(3, 3)},
    }
    for name, broken in cases.items():
        with dies(capsys, name):
            checkpoint.restore(make_gpt(), broken, tmp_path)


def test_another_vocabulary_exits_2(tmp_path, capsys):
    cfg = make_config(tmp_path)
    other = train_bpe(["hello hello"] * 9, 262)
    save(cfg, 1, tokenizer=other)
    with dies(capsys, "tokenizer of 262", f"model of {SIZES.vocab_size}"):
        checkpoint.load_gpt(cfg.out_dir)
    save(cfg, 2)
    cfg.resume = True
    with dies(capsys, "another tokenizer"):
        run(cfg, tokenizer=other)
    a = checkpoint.load(cfg.out_dir, "lm")
    checkpoint.same_vocabulary(a, a)
    b = checkpoint.Checkpoint(Path("other"), "sft", "lm", True, 1, {}, other, SIZES, {})
    with dies(capsys, "other", "different vocabularies"):
        checkpoint.same_vocabulary(a, b)


def test_resuming_another_stage_exits_2(tmp_path, capsys):
    cfg = make_config(tmp_path, resume=True)
    save(cfg, 1, stage="sft")
    with dies(capsys, "stage sft"):
        run(cfg)


def test_an_out_dir_that_cannot_be_made_exits_2(tmp_path, capsys):
    (tmp_path / "run").write_text("a file")
    with dies(capsys, "--out_dir"):
        run(make_config(tmp_path))


def test_the_score_scale_is_written_into_the_checkpoint_whole_or_not_at_all(
    tmp_path, monkeypatch, capsys
):
    cfg = make_config(tmp_path)
    save(cfg, 1, RewardModel(make_gpt()), stage="rm")
    path = Path(cfg.out_dir, "step_1")
    report.set_score_scale(path, 0.5, 2.0)
    model, _ = checkpoint.load_reward_model(cfg.out_dir)
    assert (model.score_mean.item(), model.score_sd.item()) == (0.5, 2.0)
    monkeypatch.setattr(torch, "save", lambda *a: (_ for _ in ()).throw(OSError(28, "full")))
    with dies(capsys, "could not be written"):
        report.set_score_scale(path, 9.0, 9.0)
    model, _ = checkpoint.load_reward_model(cfg.out_dir)
    assert model.score_sd.item() == 2.0


def test_masked_means_are_what_weights_stand_for():
    """The weight of a row is its loss tokens, so sum(weight * row mean) is the batch's mean."""
    batch = make_batch()
    x = torch.rand(6, 12)
    rows = [masked_mean(x[i : i + 1], batch["mask"][i : i + 1]).item() for i in range(6)]
    weight = batch["mask"].sum(1)
    wanted = masked_mean(x, batch["mask"]).item()
    found = sum(r * w.item() for r, w in zip(rows, weight)) / weight.sum().item()
    assert math.isclose(found, wanted, rel_tol=1e-5)
