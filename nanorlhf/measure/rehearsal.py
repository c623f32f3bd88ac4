"""The four stages without contents: what they allocate, in the order in which they do.

Three steps of each stage, with this project's own models, optimizer, losses and sampling, on the
device "meta". What is copied here from the scripts is only which batch goes into which loss. For
a GPU, attention is taken to be PyTorch's memory-efficient kernel.

Shapes: B sequences, P prompt tokens, T response tokens, K completions of one prompt.
"""

from functools import partial
from unittest.mock import patch

import torch

from nanorlhf import engine, model
from nanorlhf import functional as f
from nanorlhf.config import TrainConfig
from nanorlhf.fused import head_loss
from nanorlhf.machine.device import cast
from nanorlhf.machine.process import kept_below
from nanorlhf.measure.tracker import Tracker
from nanorlhf.model import GPT, ActorCritic, RewardModel, at
from nanorlhf.sampling import KVCache, sample

META = torch.device("meta")
BATCH_SIZE = {"gpt": 12, "sft": 16, "rm": 16, "ppo": 128}  # what the scripts take by themselves


def predict(cfg, stage, sizes):
    """Bytes: what stays allocated between steps (`fixed`), the `peak`, the `peaks` of each phase,
    and the `phase` that reaches the peak."""
    n = 12 * sizes.n_layer * sizes.d_model**2 + sizes.vocab_size * sizes.d_model  # about
    tracker = Tracker(heap=cfg.device == "cpu", kept=kept_below(n))
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
    """`model.attention` for tensors without contents: they do not say which kernel they want."""

    def attention(q, k, v, bias, dropout):
        if device == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] > 1:
            return formula(q, k, v, bias, dropout)
        causal = bias is None and q.shape[2] > 1
        if bias is not None:
            bias = bias.expand(*q.shape[:3], k.shape[2])
        if device == "cpu":
            kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            return kernel(q, k, v, dropout, causal, attn_mask=bias)[0]
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        return kernel(q, k, v, bias, True, dropout, causal)[0]

    return attention


def loaded(cfg, make):
    """A model with a checkpoint's weights, which on a CPU are in memory beside it for a moment."""
    weights = make().state_dict() if cfg.device == "cpu" else {}
    made = make()
    del weights
    return made


def supervised(cfg, stage, sizes, tracker):
    """Stages 1 to 3: three steps between two evaluations."""
    make = {"rm": lambda: RewardModel(GPT(sizes))}.get(stage, lambda: GPT(sizes))
    net = make() if stage == "gpt" else loaded(cfg, make)
    train_cfg = TrainConfig(
        grad_accum=min(cfg.grad_accum, 2), grad_checkpointing=cfg.grad_checkpointing
    )
    optimizer = engine.Optimizer(net, train_cfg, getattr(torch, cfg.dtype), META)
    B, T = cfg.batch_size or BATCH_SIZE[stage], cfg.prompt_tokens + cfg.max_new_tokens
    if stage == "sft":
        tracker.chosen = cfg.max_new_tokens / (T - 1)
    loss_fn = {"rm": ranking_loss, "gpt": lm_loss}.get(stage, partial(lm_loss, masked=True))
    micro = -(-B // cfg.grad_accum) * train_cfg.grad_accum  # two: the third is as the second
    shape = {"gpt": (sizes.block_size + 1,), "sft": (T,), "rm": (cfg.completions, T)}[stage]
    tracker.phase = "evaluation"
    engine.evaluate(net, loss_fn, [batch_of(B, *shape)], META)
    for shrink in (1, 4, 4) if stage == "gpt" else (1, 1, 1):  # train_gpt.py's short windows
        tracker.phase = "training step"
        short = (sizes.block_size // shrink + 1,) if stage == "gpt" else shape
        batch = batch_of(micro * shrink, *short)
        engine.train_step(net, loss_fn, batch, train_cfg, optimizer, 1e-3, META)
    tracker.phase = "evaluation"
    engine.evaluate(net, loss_fn, [batch_of(B, *shape)], META)
    tracker.fixed = tracker.live
    if stage == "rm":  # the best checkpoint is read, and its scores are standardised
        tracker.phase = "standardising"
        best = cast(loaded(cfg, make), getattr(torch, cfg.dtype), META)
        engine.evaluate(best, loss_fn, [batch_of(B, *shape)], META)
        loaded(cfg, make)


def batch_of(B, *shape):
    return {"tokens": torch.zeros(B, *shape, dtype=torch.long), "weight": torch.ones(B)}


def lm_loss(net, batch, masked=False):
    """Of train_gpt.py and train_sft.py."""
    inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
    mask = targets >= 0 if masked else None
    return head_loss(net.hidden(inputs), net.head_weight, targets, mask), {}


def ranking_loss(net, batch, parts=4):
    """Of train_rm.py, where all completions are of one length."""
    B, K, T = batch["tokens"].shape
    tokens = batch["tokens"].flatten(0, 1).clone()
    mask = torch.ones_like(tokens, dtype=torch.bool)
    found = [net.score(t, m) for t, m in zip(tokens.chunk(parts), mask.chunk(parts))]
    ranks = torch.zeros(B, K, dtype=torch.long)
    return f.ranking_loss(torch.cat(found).view(B, K), ranks), {}


def ppo(cfg, stage, sizes, tracker):
    """Stage 4: three iterations."""
    dtype, make_reward = getattr(torch, cfg.dtype), lambda: RewardModel(GPT(sizes))
    gpt = loaded(cfg, lambda: GPT(sizes))
    reward = cast(loaded(cfg, make_reward), dtype, META).eval().requires_grad_(False)
    model.freeze_layers(gpt, cfg.freeze_layers)
    critic = loaded(cfg, make_reward) if cfg.critic == "separate" else None
    policy = ActorCritic(gpt, critic).eval()
    train_cfg = TrainConfig(grad_checkpointing=cfg.grad_checkpointing)
    optimizer = engine.Optimizer(policy, train_cfg, dtype, META, eps=1e-5)
    reference = model.frozen_reference(gpt)
    B, P = max(cfg.batch_size or BATCH_SIZE[stage], cfg.eval_prompts), cfg.prompt_tokens
    T = cfg.max_new_tokens
    micro = -(-min(cfg.minibatch_size, B) // cfg.grad_accum)
    for _ in range(3):
        tracker.phase = "rollout"
        decode(gpt, B, P, T)
        tracker.phase = "measuring"
        measure(policy, reference, torch.zeros(micro, P + T, dtype=torch.long), P)
        tracker.phase = "scoring"
        with torch.no_grad():
            reward.score(*sequences(min(B, 256), min(P + T + 1, sizes.block_size)))
        tracker.phase = "update"
        for _ in range(min(cfg.grad_accum, 2)):
            tokens = torch.zeros(micro, P + T, dtype=torch.long)
            optimizer.backward(ppo_loss(policy, tokens, P), 1.0)
        optimizer.step(1e-3)
    tracker.fixed = tracker.live


def sequences(rows, T):
    return torch.zeros(rows, T, dtype=torch.long), torch.ones(rows, T, dtype=torch.bool)


@torch.no_grad()
def decode(gpt, B, P, T):
    """`sampling.generate`, but only what takes new memory: the first and the last token, and that
    a quarter of the rows leaves, the rest being copied."""
    pads = torch.zeros(B, dtype=torch.long)
    cache = KVCache(gpt.config, pads, P + T, gpt.dtype)
    tokens, noise = torch.zeros(B, P, dtype=torch.long), torch.zeros(B, T)
    for t in {0: 0, T - 1: 0}:
        cache.length = P + t - tokens.shape[1]
        hidden = gpt.hidden(tokens, cache)[:, -1]
        tokens = sample(gpt.head(hidden), noise[:, t])[:, None]
    cache.keep(torch.arange(B - B // 4))


@torch.no_grad()
def measure(policy, reference, tokens, P):
    """Of train_ppo.py: log-probs, entropy and exact KL of a group of the rollout's rows."""
    logits, values = policy(tokens, states_of(tokens, P))
    ref_logits = reference.head(at(reference.hidden(tokens), states_of(tokens, P)))
    for x in (logits, ref_logits):
        f.logprobs_from_logits(x, tokens[:, P:])
    f.entropy_from_logits(logits)
    f.kl_exact(logits, ref_logits)


def states_of(tokens, P):
    return torch.arange(P - 1, tokens.shape[1] - 1).expand(len(tokens), -1)


def ppo_loss(policy, tokens, P):
    """Of train_ppo.py, without the terms that are off by default."""
    logits, values = policy(tokens, states_of(tokens, P))
    logprobs = f.logprobs_from_logits(logits, tokens[:, P:])
    mask = torch.ones_like(logprobs, dtype=torch.bool)
    old = torch.zeros_like(values)
    pg, _ = f.policy_loss(logprobs, old, old, mask, 0.2)
    vf, _ = f.value_loss(values, old, old, mask, 0.2)
    return pg + 0.1 * vf
