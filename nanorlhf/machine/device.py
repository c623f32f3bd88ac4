"""Which device a run computes on, and in which precision."""

import torch

from nanorlhf.config import die
from nanorlhf.machine import process, ranks


def pick_device(cfg):
    """torch.device for --device; auto takes CUDA, then Apple's MPS (untested), then the CPU. Under
    torchrun each process has its own device, and this is where the processes meet."""
    process.keep_freed_memory()
    has_mps = torch.backends.mps.is_available()
    auto = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    name = auto if cfg.device == "auto" else cfg.device
    try:
        device = ranks.join(torch.device(name))
        torch.zeros(1, device=device).item()  # "meta" has no numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        die(f"--device {cfg.device}: {str(error).splitlines()[0]}")
    return device


def pick_dtype(cfg, device):
    """torch.dtype for --dtype; auto is bfloat16 where the hardware multiplies it fast."""
    if cfg.dtype != "auto":
        return getattr(torch, cfg.dtype)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = torch.cpu.get_capabilities()
        fast = device.type == "cpu" and (has.get("amx_bf16") or has.get("avx512_bf16"))
    return torch.bfloat16 if fast else torch.float32


def cast(model, dtype, device):
    """Move a model to a device and its parameters, not its buffers, to a dtype, in place."""
    model.to(device)
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model
