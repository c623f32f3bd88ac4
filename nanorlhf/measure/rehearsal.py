"""Rehearse a stage on tensors without contents, to learn what memory it takes.

A rehearsal is three steps on the device "meta", with the script's own losses and this project's
models, optimizer and sampling, so that it allocates what the stage does, in the same order. On a
GPU, attention is taken to be PyTorch's memory-efficient kernel.

Shapes: B sequences, b of a micro-batch, P prompt tokens, T response tokens, S = P + T.
"""

from functools import partial
from unittest.mock import patch

import torch

from nanorlhf import engine, model
from nanorlhf.config import TrainConfig
from nanorlhf.llama import make_gpt
from nanorlhf.machine.device import cast
from nanorlhf.machine.process import kept_below
from nanorlhf.measure.stages import load_stage
from nanorlhf.measure.tracker import Tracker
from nanorlhf.model import ActorCritic, RewardModel
from nanorlhf.sampling import KVCache, sample

META = torch.device("meta")
BATCH_SIZE = {"gpt": 12, "sft": 16, "rm": 16, "ppo": 128}  # the scripts' defaults


def predict(cfg, stage, sizes):
    """Bytes by name: `fixed` stays allocated between steps, `peaks` are those of each phase, and
    `peak` is the highest of them, that of `phase`. `sizes` is the model's GPTConfig."""
    n_parameters = 12 * sizes.n_layer * sizes.d_model**2 + sizes.vocab_size * sizes.d_model  # about
    tracker = Tracker(heap=cfg.device == "cpu", kept=kept_below(n_parameters))
    with (
        patch.object(model, "attention", kernel_of(cfg.device)),
        patch("torch.optim.adam._device_dtype_check_for_fused"),
        META,
        tracker,
    ):
        run = ppo if stage == "ppo" else supervised
        run(cfg, stage, sizes, tracker)
    phase = max(tracker.peaks, key=tracker.peaks.get)
    return {
        "fixed": tracker.fixed,
        "peak": tracker.peaks[phase],
        "phase": phase,
        "peaks": tracker.peaks,
    }


def kernel_of(device, formula=model.attention):
    """A replacement of `model.attention` that names the kernel. PyTorch chooses it by the tensors'
    device, which here is "meta" and not the one that is rehearsed."""

    def attention(q, k, v, bias, dropout):
        if device == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] > 1:
            return formula(q, k, v, bias, dropout)
        causal = bias is None and q.shape[2] > 1
        if device == "cuda" and q.shape[1] != k.shape[1] and q.shape[2] > 1:
            # a GPU's one kernel that takes fewer heads of k has no bias and no float32
            if q.dtype != torch.bfloat16 or not causal:
                return formula(q, k, v, bias, dropout)
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout, causal)[0]
        if bias is not None:
            bias = bias.expand(*q.shape[:3], k.shape[2])
        if device == "cpu":
            kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            return kernel(q, k, v, dropout, causal, attn_mask=bias)[0]
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        return kernel(q, k, v, bias, True, dropout, causal)[0]

    return attention


def loaded(cfg, make):
    """make(), as when a checkpoint is read: on a CPU its weights are in memory for a moment too."""
    weights = make().state_dict() if cfg.device == "cpu" else {}
    net = make()
    del weights
    return net


def supervised(cfg, stage, sizes, tracker):
    """Stages 1 to 3: three steps between two evaluations."""

    def make():
        return RewardModel(make_gpt(sizes)) if stage == "rm" else make_gpt(sizes)

    net = make() if stage == "gpt" else loaded(cfg, make)
    if stage != "gpt":
        model.freeze_layers(net.gpt if stage == "rm" else net, cfg.freeze_layers)
    train_cfg = TrainConfig(
        grad_accum=min(cfg.grad_accum, 2), grad_checkpointing=cfg.grad_checkpointing
    )
    optimizer = engine.Optimizer(net, train_cfg, getattr(torch, cfg.dtype), META)
    B, S = cfg.batch_size or BATCH_SIZE[stage], cfg.prompt_tokens + cfg.max_new_tokens
    script = load_stage(stage)
    if stage == "gpt":
        loss_fn, shape = script.text_loss, (sizes.block_size + 1,)
    elif stage == "sft":
        loss_fn, shape = script.response_loss, (S,)
        tracker.chosen = cfg.max_new_tokens / (S - 1)
    else:
        loss_fn, shape = partial(script.feedback_loss, "rankings", 4), (cfg.completions, S)
    # two micro-batches of a step at most: a third would take what the second took
    rows = -(-B // cfg.grad_accum) * train_cfg.grad_accum
    tracker.phase = "evaluation"
    engine.evaluate(net, loss_fn, [batch_of(B, *shape)], train_cfg, META)
    tracker.phase = "training step"
    for shrink in (1, 4, 4) if stage == "gpt" else (1, 1, 1):  # train_gpt.py's short windows
        window = (sizes.block_size // shrink + 1,) if stage == "gpt" else shape
        batch = batch_of(rows * shrink, *window)
        engine.train_step(net, loss_fn, batch, train_cfg, optimizer, 1e-3, META)
    tracker.phase = "evaluation"
    engine.evaluate(net, loss_fn, [batch_of(B, *shape)], train_cfg, META)
    tracker.fixed = tracker.live
    if stage == "rm":  # the best checkpoint is read, and its scores are standardised
        tracker.phase = "standardising"
        best = cast(loaded(cfg, make), getattr(torch, cfg.dtype), META)
        engine.evaluate(best, loss_fn, [batch_of(B, *shape)], train_cfg, META)
        loaded(cfg, make)


def batch_of(B, *shape):
    """B rows of what the losses read, each of this shape. Lengths and weights are on the CPU, and
    have contents, as in a real batch."""
    ones = lambda *dims: torch.full(dims, 1, device="cpu")
    mask = torch.ones(B, *shape, dtype=torch.bool)
    ranks = torch.zeros(B, *shape[:-1], dtype=torch.long)
    return {
        "tokens": torch.zeros(B, *shape, dtype=torch.long),
        "mask": mask,
        "tokens_per_byte": torch.ones(B),
        "present": mask[..., 0],
        "target": ranks,
        "n_completion": ones(B, *shape[:-1]) * shape[-1],
        "weight": ones(B),
    }


def ppo(cfg, stage, sizes, tracker):
    """Stage 4: three iterations."""
    dtype = getattr(torch, cfg.dtype)
    make_reward = lambda: RewardModel(make_gpt(sizes))
    gpt = loaded(cfg, lambda: make_gpt(sizes))
    reward = cast(loaded(cfg, make_reward), dtype, META).eval().requires_grad_(False)
    model.freeze_layers(gpt, cfg.freeze_layers)
    critic = loaded(cfg, make_reward) if cfg.critic == "separate" else cfg.critic
    policy = ActorCritic(gpt, critic).eval()
    script = load_stage(stage)
    flags = script.Config(grad_checkpointing=cfg.grad_checkpointing)
    optimizer = engine.Optimizer(policy, flags, dtype, META, eps=1e-5)
    reference = model.frozen_reference(gpt)
    P, T = cfg.prompt_tokens, cfg.max_new_tokens
    B = max(cfg.batch_size or BATCH_SIZE[stage], cfg.eval_prompts)
    b = -(-min(cfg.minibatch_size, B) // cfg.grad_accum)
    for _ in range(3):
        tracker.phase = "rollout"
        decode(gpt, B, P, T)
        tracker.phase = "measuring"
        rows = rollout_rows(b, P, T)
        with torch.no_grad():
            if cfg.freeze_layers:
                rows["trunk"] = reference.trunk(rows["tokens"], cfg.freeze_layers)
            rows |= script.measure(flags, policy, reference, rows)
        tracker.phase = "scoring"
        with torch.no_grad():
            reward.score(*sequences(min(B, 256), min(P + T + 1, sizes.block_size)))
        tracker.phase = "update"
        rows |= {"advantages": rows["logprobs"], "returns": rows.get("values")}
        for _ in range(min(cfg.grad_accum, 2)):
            loss, stats = script.ppo_loss(flags, policy, reference, rows)
            optimizer.backward(loss, stats, torch.ones(1, device="cpu"))
            del loss, stats
        optimizer.stats()
        optimizer.step(1e-3)
    tracker.fixed = tracker.live


def rollout_rows(b, P, T):
    """A rollout before it is measured: what `measure` and `ppo_loss` read of it."""
    return {
        "tokens": torch.zeros(b, P + T, dtype=torch.long),
        "states": torch.arange(P - 1, P + T - 1).expand(b, -1),
        "responses": torch.zeros(b, T, dtype=torch.long),
        "response_mask": torch.ones(b, T, dtype=torch.bool),
    }


def sequences(B, S):
    """(tokens, mask), each (B, S)."""
    return torch.zeros(B, S, dtype=torch.long), torch.ones(B, S, dtype=torch.bool)


@torch.no_grad()
def decode(gpt, B, P, T):
    """The parts of `sampling.generate` that take new memory: the first and the last token, and the
    copy of the cache that is made when a quarter of the rows has ended."""
    pads = torch.zeros(B, dtype=torch.long)
    cache = KVCache(gpt.config, pads, P + T, gpt.dtype)
    tokens, noise = torch.zeros(B, P, dtype=torch.long), torch.zeros(B, T)
    for t in sorted({0, T - 1}):
        cache.length = P + t - tokens.shape[1]
        hidden = gpt.hidden(tokens, cache)[:, -1]
        tokens = sample(gpt.head(hidden), noise[:, t])[:, None]
    cache.keep(torch.arange(B - B // 4))
