"""Predict the peak memory of each stage, and name the flags that make it fit.

    python -m nanorlhf memory --init gpt2-xl --device cuda --memory_gb 80
    python -m nanorlhf memory --init out/gpt --stages sft --batch_size 64

The stages are rehearsed on tensors without contents (see rehearsal.py): no weights, no GPU and
next to no memory are needed. On a CPU the bytes of the tensors are right to a few per cent, and
what malloc loses between them is estimated by a rough model. The figures for a GPU have not been
measured yet. Not counted is what CUDA and cuBLAS take for themselves, and what the embedded world
adds where no --data is given (train_rm.py then samples 512 responses at a time, and else 64).
"""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from nanorlhf.config import arg, die
from nanorlhf.hf.folder import checked as checked_sizes
from nanorlhf.hf.folder import model_config_of, read_json
from nanorlhf.hf.load import KNOWN
from nanorlhf.llama import config_from
from nanorlhf.machine.device import pick_dtype
from nanorlhf.measure.rehearsal import BATCH_SIZE, predict
from nanorlhf.model import GPTConfig
from nanorlhf.run import checkpoint

GIB = 2**30
USABLE = 0.9  # of the memory; the rest is the system's, CUDA's, and lost between the tensors


@dataclass
class Config:
    """Predict each stage's peak memory, and name the flags that make it fit."""

    init: str = arg("out/gpt", f"checkpoint folder, or {', '.join(KNOWN)}")
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
    cfg = checked(cfg)
    sizes = model_sizes(cfg.init)
    if cfg.prompt_tokens + cfg.max_new_tokens > sizes.block_size:
        die(
            f"--prompt_tokens {cfg.prompt_tokens} --max_new_tokens {cfg.max_new_tokens}: "
            f"the context of {cfg.init} is {sizes.block_size} tokens"
        )
    if not 0 <= cfg.freeze_layers <= sizes.n_layer:
        die(f"--freeze_layers {cfg.freeze_layers}: {cfg.init} has {sizes.n_layer} blocks")
    print(f"{cfg.init} on {cfg.device} with {cfg.memory_gb:.1f} GiB, {cfg.dtype}\n")
    print("stage  weights, optimizer  activations      peak  reached in")
    limit, advice = USABLE * cfg.memory_gb * GIB, []
    for stage in cfg.stages:
        found = predict(cfg, stage, sizes)
        fixed, peak = found["fixed"] / GIB, found["peak"] / GIB
        fits = found["peak"] <= limit
        print(
            f"{stage:5}  {fixed:14.2f} GiB  {peak - fixed:7.2f} GiB  {peak:5.2f} GiB  "
            f"{found['phase']}{'' if fits else '  does not fit'}"
        )
        if not fits:
            advice.append((stage, *make_fit(cfg, stage, sizes, limit)))
    for stage, flags, peak in advice:
        typed = " ".join(f"--{k}" if v is True else f"--{k} {v}" for k, v in flags.items())
        verdict = "fits with" if peak <= limit else "does not fit even with"
        print(f"\ntrain_{stage}.py {verdict} {typed}: {peak / GIB:.2f} GiB")
    return advice


def checked(cfg):
    """The flags with device, dtype and memory_gb filled in. What makes no sense exits 2."""
    for name in ("grad_accum", "prompt_tokens", "max_new_tokens", "completions", "minibatch_size"):
        if getattr(cfg, name) < 1:
            die(f"--{name} {getattr(cfg, name)}: must be at least 1")
    if min(cfg.batch_size, cfg.eval_prompts, cfg.memory_gb) < 0 or not cfg.stages:
        die("--batch_size, --eval_prompts and --memory_gb must not be negative, --stages not empty")
    has_gpu = torch.cuda.is_available()
    device = cfg.device
    if device == "auto":
        device = "cuda" if has_gpu else "cpu"
    if cfg.memory_gb:
        memory = cfg.memory_gb * GIB
    elif device == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    elif has_gpu:
        memory = torch.cuda.get_device_properties(0).total_memory
    else:
        die("--device cuda: there is no GPU here to ask; say --memory_gb")
    dtype = cfg.dtype
    if dtype == "auto" and device == "cuda" and not has_gpu:
        dtype = "bfloat16"  # there is no GPU to ask whether it is fast; on those of today it is
    elif dtype == "auto":
        dtype = str(pick_dtype(cfg, torch.device(device))).removeprefix("torch.")
    return dataclasses.replace(cfg, device=device, dtype=dtype, memory_gb=memory / GIB)


def model_sizes(init):
    """GPTConfig of a known name, or of a checkpoint without reading its weights."""
    if init in KNOWN:
        return GPTConfig(50260, 1024, *KNOWN[init])
    path = checkpoint.find(init)
    if path is None and Path(init, "config.json").exists():  # of a model in Hugging Face layout
        return model_config_of(read_json(Path(init, "config.json")), init)
    if path is None:
        die(f"--init {init}: no checkpoint there, and not one of {', '.join(KNOWN)}")
    try:
        return checked_sizes(config_from(json.loads((path / "config.json").read_text())["model"]))
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        die(f"{path}: not a whole checkpoint ({type(error).__name__}: {error})")


def make_fit(cfg, stage, sizes, limit):
    """(flags, peak) with which a stage fits, or its lowest peak. Changes of flags are tried in the
    order of what they cost, and kept if they lower the peak by a hundredth. In the end those are
    taken back without which it fits too."""
    peak_of = lambda flags: predict(dataclasses.replace(cfg, **flags), stage, sizes)["peak"]
    flags, peak = {}, peak_of({})
    for change in 2 * changes(cfg, stage, sizes):  # twice: one change may only help after another
        if peak > limit and (lower := peak_of(flags | change)) < 0.99 * peak:
            flags, peak = flags | change, lower
    for name in list(flags):
        fewer = {k: v for k, v in flags.items() if k != name}
        if peak <= limit and (higher := peak_of(fewer)) <= limit:
            flags, peak = fewer, higher
    return flags, peak


def changes(cfg, stage, sizes):
    """Flags that save memory, the cheapest first: precision, time, then what is learned."""
    B = cfg.batch_size or BATCH_SIZE[stage]
    rows = min(B, cfg.minibatch_size) if stage == "ppo" else B
    halves = lambda n: [n >> i for i in range(1, n.bit_length())]
    found = [{"dtype": "bfloat16"}]
    found += [{"grad_accum": 2**i} for i in range(1, rows.bit_length()) if 2**i > cfg.grad_accum]
    found += [{"grad_checkpointing": True}]
    if stage == "ppo":
        found += [{"minibatch_size": n} for n in halves(rows)]
        found += [{"critic": "shared"}, {"freeze_layers": max(sizes.n_layer // 2, 1)}]
        return found + [{"batch_size": n, "eval_prompts": n} for n in halves(B)]
    return found + [{"batch_size": n} for n in halves(B)]
