"""The four stages without contents: what they allocate, in the order in which they do.

Three steps of each stage, with this project's own models, optimizer, losses and sampling, on the
device "meta". What is copied here from the scripts is only which batch goes into which loss. For
a GPU, attention is taken to be PyTorch's memory-efficient kernel.

Shapes: B sequences, P prompt tokens, T response tokens, K completions of one prompt.
"""

from unittest.mock import patch

import torch

from nanorlhf import engine, model
from nanorlhf import functional as f
from nanorlhf.config import TrainConfig, kept_below
from nanorlhf.model import GPT, ActorCritic, KVCache, RewardModel
from nanorlhf.sampling import sample
from nanorlhf.tools.tracker import Tracker

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

    def attention(q, k, v, allowed, dropout):
        if device == "cpu" and q.dtype == torch.bfloat16:
            return formula(q, k, v, allowed, dropout)
        causal = allowed is None and q.shape[2] > 1
        if allowed is not None:
            bias = torch.zeros_like(allowed, dtype=q.dtype).masked_fill_(~allowed, -torch.inf)
            allowed = bias.expand(*q.shape[:3], k.shape[2])
        if device == "cpu":
            kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            return kernel(q, k, v, dropout, causal, attn_mask=allowed)[0]
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        return kernel(q, k, v, allowed, True, dropout, causal)[0]

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
    loss_fn = ranking_loss if stage == "rm" else lm_loss
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
        best = engine.cast(loaded(cfg, make), getattr(torch, cfg.dtype), META)
        engine.evaluate(best, loss_fn, [batch_of(B, *shape)], META)
        loaded(cfg, make)


def batch_of(B, *shape):
    return {"tokens": torch.zeros(B, *shape, dtype=torch.long), "weight": torch.ones(B)}


def lm_loss(net, batch):
    """Of train_gpt.py and train_sft.py."""
    inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
    return f.lm_loss(net(inputs), targets, targets >= 0), {}


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
    reward = engine.cast(loaded(cfg, make_reward), dtype, META).eval().requires_grad_(False)
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
        measure(policy, reference, *sequences(micro, P + T), P)
        tracker.phase = "scoring"
        with torch.no_grad():
            reward.score(*sequences(min(B, 256), min(P + T + 1, sizes.block_size)))
        tracker.phase = "update"
        for _ in range(min(cfg.grad_accum, 2)):
            optimizer.backward(ppo_loss(policy, *sequences(micro, P + T), P), 1.0)
        optimizer.step(1e-3)
    tracker.fixed = tracker.live


def sequences(rows, T):
    return torch.zeros(rows, T, dtype=torch.long), torch.ones(rows, T, dtype=torch.bool)


@torch.no_grad()
def decode(gpt, B, P, T):
    """`sampling.generate`, but only the tokens that take new memory: the first, the last, and
    those at which the cache grows."""
    cache = KVCache(gpt.config, B, META, gpt.wte.weight.dtype)
    (tokens, mask), noise = sequences(B, P + T), torch.zeros(B, T)
    tokens = tokens[:, :P]
    for t in range(T):
        if t in (0, T - 1) or P + t > cache.keys.shape[3]:
            cache.used = P + t - tokens.shape[1]
            hidden = gpt.hidden(tokens, mask[:, : P + t], cache)[:, -1]
            tokens = sample(gpt.head(hidden), noise[:, t])[:, None]


@torch.no_grad()
def measure(policy, reference, tokens, mask, P):
    """Of train_ppo.py: log-probs, entropy and exact KL of a chunk of the rollout."""
    logits, values = policy(tokens, mask, P)
    ref_logits = reference.head(reference.hidden(tokens, mask)[:, P - 1 : -1])
    for x in (logits, ref_logits):
        f.logprobs_from_logits(x, tokens[:, P:])
    f.entropy_from_logits(logits)
    f.kl_exact(logits, ref_logits)


def ppo_loss(policy, tokens, mask, P):
    """Of train_ppo.py, without the terms that are off by default."""
    logits, values = policy(tokens, mask, P)
    logprobs, mask = f.logprobs_from_logits(logits, tokens[:, P:]), mask[:, P:]
    old = torch.zeros_like(values)
    pg, _ = f.policy_loss(logprobs, old, old, mask, 0.2)
    vf, _ = f.value_loss(values, old, old, mask, 0.2)
    return pg + 0.1 * vf
