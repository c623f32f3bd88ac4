"""Predict the peak memory of each stage, and name the flags that make it fit.

    python -m nanorlhf memory --init gpt2-xl --device cuda --memory_gb 80
    python -m nanorlhf memory --init out/gpt --stages sft --batch_size 64

This is arithmetic on shapes: weights, gradients, AdamW's two moments, what blocks keep for the
backward pass, logits, the cache. It takes every sequence to be of full length. docs/machines.md has
measured peaks beside it. Not counted is what CUDA takes for its context, and what the embedded
world adds where no --data is given.

Letters: B sequences, b of a micro-batch, P prompt tokens, T response tokens, S positions, D width,
V vocabulary entries; e is the number of bytes of a number in the compute precision.
"""

import os
from dataclasses import dataclass, replace

import torch

from nanorlhf.config import arg, die
from nanorlhf.fused import HeadLoss
from nanorlhf.llama import LlamaConfig
from nanorlhf.loading import GPT2_SIZES, model_sizes
from nanorlhf.machine.device import pick_dtype

GIB = 2**30
BATCH_SIZE = {"gpt": 12, "sft": 16, "rm": 16, "ppo": 128}  # the scripts' defaults
BESIDES = {"cpu": 0.08 * GIB, "cuda": 0.125 * GIB}  # code and buffers of libraries, as measured


@dataclass
class Config:
    """Predict each stage's peak memory, and name the flags that make it fit."""

    init: str = arg("out/gpt", f"checkpoint, model folder, or {', '.join(GPT2_SIZES)}")
    stages: list[str] = arg(list(BATCH_SIZE), "which stages", choices=tuple(BATCH_SIZE))
    device: str = arg("auto", "what to predict for", choices=("auto", "cpu", "cuda"))
    dtype: str = arg("auto", "compute precision", choices=("auto", "float32", "bfloat16"))
    memory_gb: float = arg(0.0, "what the device has, in 2^30 bytes; 0: asks this machine's")
    batch_size: int = arg(0, "as in the stages; 0: each stage's default")
    grad_accum: int = arg(1, "as in the stages")
    grad_checkpointing: bool = arg(False, "as in the stages")
    prompt_tokens: int = arg(128, "longest prompt, its role tokens included")
    max_new_tokens: int = arg(128, "longest response, its eos included")
    completions: int = arg(4, "rm: judged completions per prompt")
    minibatch_size: int = arg(64, "ppo: sequences per optimizer step")
    eval_prompts: int = arg(128, "ppo: held-out prompts to evaluate on", low=0)
    freeze_layers: int = arg(0, "sft, rm, ppo: freeze embeddings and this many blocks")
    critic: str = arg("shared", "ppo: the value function", choices=("shared", "separate"))


def main(cfg):
    cfg, sizes = resolved(cfg), model_sizes(cfg.init)
    n_tokens = cfg.prompt_tokens + cfg.max_new_tokens
    if n_tokens > sizes.block_size or cfg.freeze_layers > sizes.n_layer:
        die(f"{cfg.init}: its context is {sizes.block_size} tokens, it has {sizes.n_layer} blocks")
    print(f"{cfg.init}, {cfg.device}, {cfg.memory_gb:.1f} GiB, {cfg.dtype}")
    limit = 0.9 * cfg.memory_gb * GIB  # the rest is the system's, and lost between the tensors
    for stage in cfg.stages:
        fixed, phases = predict(cfg, stage, sizes)
        phase, peak = max(phases.items(), key=lambda item: item[1])
        print(f"{stage:4}{fixed / GIB:7.2f} GiB stay, {peak / GIB:6.2f} GiB at most: {phase}")
        if peak > limit:
            flags, peak = make_fit(cfg, stage, sizes, limit)
            typed = " ".join(f"--{k}" if v is True else f"--{k} {v}" for k, v in flags.items())
            verdict = "fits" if peak <= limit else "does not fit even"
            print(f"train_{stage}.py {verdict} with {typed}: {peak / GIB:.2f} GiB")


def resolved(cfg):
    """The flags with device, dtype and memory_gb filled in."""
    has_gpu, memory = torch.cuda.is_available(), cfg.memory_gb
    device = cfg.device if cfg.device != "auto" else "cuda" if has_gpu else "cpu"
    if device == "cuda" and not has_gpu:
        if not memory:
            die("--device cuda: there is no GPU here to ask; say --memory_gb")
        dtype = "bfloat16" if cfg.dtype == "auto" else cfg.dtype  # fast on GPUs of today
        return replace(cfg, device=device, dtype=dtype)
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    here = torch.cuda.mem_get_info()[1] if device == "cuda" else here
    dtype = str(pick_dtype(cfg, torch.device(device))).removeprefix("torch.")
    return replace(cfg, device=device, dtype=dtype, memory_gb=memory or here / GIB)


def make_fit(cfg, stage, sizes, limit):
    """(flags, peak) with which a stage fits, or its peak with all of them. Flags are added in the
    order of what they cost: precision, time, then what is learned. In the end those go again
    without which it fits, too."""

    def peak_of(flags):
        return max(predict(replace(cfg, **flags), stage, sizes)[1].values())

    B = cfg.batch_size or BATCH_SIZE[stage]
    b = min(B, cfg.minibatch_size) if stage == "ppo" else B
    parts, fewer = [[2**i for i in range(1, n.bit_length())] for n in (b, B)]
    changes = [{"dtype": "bfloat16"}, *({"grad_accum": n} for n in parts if n > cfg.grad_accum)]
    changes += [{"grad_checkpointing": True}]
    if stage == "ppo":
        changes += [*({"minibatch_size": b // n} for n in parts), {"critic": "shared"}]
        changes += [{"freeze_layers": max(sizes.n_layer // 2, 1)}]
        changes += [{"batch_size": B // n, "eval_prompts": B // n} for n in fewer]
    flags = {}
    for change in changes + [{"batch_size": B // n} for n in fewer]:
        flags |= change if peak_of(flags) > limit else {}
    for name in reversed(list(flags)):
        others = {k: v for k, v in flags.items() if k != name}
        flags = others if peak_of(others) <= limit else flags
    return flags, peak_of(flags)


# ---- the arithmetic ----------------------------------------------------------------------------


def predict(cfg, stage, sizes):
    """(bytes of weights and optimizer, {phase: all bytes that it holds at most})."""
    is_ppo, n_frozen = stage == "ppo", cfg.freeze_layers if stage != "gpt" else 0
    with torch.device("meta"):
        gpt = sizes.build()
    modules = [*gpt.ends, *gpt.h[:n_frozen]] if n_frozen else []
    n, frozen = (sum(p.numel() for m in part for p in m.parameters()) for part in ([gpt], modules))
    e, networks = 2 if cfg.dtype == "bfloat16" else 4, 1 + (is_ppo and cfg.critic == "separate")
    # a weight in float32, its two moments, perhaps its copy in bfloat16
    fixed = networks * (12 if e == 4 else 14) * n - 8 * frozen
    fixed += e * (2 * n - frozen) if is_ppo else 0  # the reference and the judge
    besides, gradients = fixed + BESIDES[cfg.device], 4 * (networks * n - frozen)

    T, V, S = cfg.max_new_tokens, sizes.vocab_size, cfg.prompt_tokens + cfg.max_new_tokens
    B, S = cfg.batch_size or BATCH_SIZE[stage], sizes.block_size if stage == "gpt" else S
    b = -(-(min(B, cfg.minibatch_size) if is_ppo else B) // cfg.grad_accum)
    texts, at_once = (cfg.completions, 4) if stage == "rm" else (1, 1)  # read in so many parts
    block, state = block_bytes(cfg, sizes, e, S), e * sizes.d_model
    passing = b * texts * S * block / at_once  # one block, one part
    kept = passing if cfg.grad_checkpointing else 0
    kept += b * texts * S * (state if kept else block) * (sizes.n_layer - n_frozen)
    kept = networks * (kept + 4 * b * texts * S * state)
    added = gradients if cfg.grad_accum > 1 else 0  # of earlier micro-batches
    phases = {"optimizer step": besides + gradients + (added / 2 if e == 2 else 0) + passing}
    if is_ppo:
        B, n_logits = max(B, cfg.eval_prompts), b * T * V
        cache = 2 * e * B * S * sizes.n_layer * sizes.cache_heads[0] * sizes.cache_heads[1]
        phases["rollout"] = besides + cache + max(0.75 * cache, 12 * B * V)
        phases["measuring"] = besides + passing + (2 * e + 20) * n_logits
        phases["update"] = besides + added + kept + 16 * n_logits
        return fixed, phases
    losses = {"gpt": S, "sft": T, "rm": 0}[stage] * V  # logits of a sequence
    head = V * sizes.d_model if losses and not n_frozen else 0
    phases["training step"] = besides + added + kept + logits_bytes(b * losses, head, e)
    phases["evaluation"] = besides + max(B / b * passing, logits_bytes(B * losses, 0, e))
    return fixed, phases


def logits_bytes(n_logits, head, e):
    """What `fused.head_loss` holds of its logits, which it takes piece by piece, and the gradient
    of a head of so many weights."""
    piece = min(n_logits, HeadLoss.AT_ONCE)
    again = 4 if n_logits > piece else 0
    return piece * ((8 if e == 4 else 10) + again) + head * (4 + again + e % 4)


def block_bytes(cfg, sizes, e, S):
    """What a block keeps of a token for the backward pass: inputs of its norms, products and
    activations, and q, k, v. Where attention is written out, its row of S scores as well."""
    heads, width = sizes.cache_heads
    D, H, on_cpu = sizes.d_model, sizes.n_head, cfg.device == "cpu"
    kept = 16 * D * e
    if isinstance(sizes, LlamaConfig):  # norms in float32; q and k before and after their rotation
        kept = 2 * D * (4 + 2 * e) + e * (3 * H + 3 * heads) * width + 4 * e * sizes.d_mlp
        kept += 2 * e * H * width if H != heads else 0  # k and v, once for each query
    return kept + (e * H * S if e == 2 and on_cpu or e == 4 and not on_cpu and H != heads else 0)
