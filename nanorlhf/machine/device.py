"""Which device a run computes on, and in which precision."""

import torch

from nanorlhf.config import die, note, once
from nanorlhf.machine import process, ranks


def pick_device(cfg):
    """torch.device for --device; auto takes CUDA, then Apple's MPS (untested), then the CPU. Under
    torchrun each process gets a device of its own, and waits here for the other processes."""
    process.keep_freed_memory()
    best = "mps" if torch.backends.mps.is_available() else "cpu"
    best = "cuda" if torch.cuda.is_available() else best
    try:
        device = ranks.join(torch.device(best if cfg.device == "auto" else cfg.device))
        torch.zeros(1, device=device).item()  # raises on "meta", which holds no numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        die(f"--device {cfg.device}: {str(error).splitlines()[0]}")
    return device


def pick_dtype(cfg, device):
    """torch.dtype for --dtype; auto is bfloat16 where the hardware multiplies it fast."""
    if cfg.dtype != "auto":
        return getattr(torch, cfg.dtype)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)  # not on a T4, a V100
        if not fast:
            once(note, "--dtype auto: float32, as this GPU does not multiply bfloat16")
    else:
        able = torch.cpu.get_capabilities()
        fast = device.type == "cpu" and (able.get("amx_bf16") or able.get("avx512_bf16"))
    return torch.bfloat16 if fast else torch.float32


def cast(model, dtype, device):
    """Move a model to a device, in place, and its parameters to a dtype. Buffers keep theirs."""
    model.to(device)
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model
