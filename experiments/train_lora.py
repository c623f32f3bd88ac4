"""A fork of stage 2: LoRA (arXiv:2106.09685). The model stays as it is; beside each matrix W of a
block stand two thin ones, and only these learn:

    y = W x + alpha / rank * B A x,    A (rank, in) random, B (out, rank) zero at first

    python -m experiments.train_lora                    # A and B in out/lora/adapters
    python -m nanorlhf evaluate --models lora=out/lora  # W + alpha / rank * B A, all that follows
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import train_sft
from nanorlhf.config import arg, from_cli
from nanorlhf.run import checkpoint


@dataclass
class Config(train_sft.Config):
    """Fine-tune thin matrices beside the model's own."""

    out_dir: str = arg("out/lora", "folder for the merged checkpoint, and for adapters/")
    rank: int = arg(8, "rows of A, columns of B")
    alpha: float = arg(16.0, "scale of what is added, times the rank")
    learning_rate: float = arg(1e-2, "peak learning rate")
    check: bool = arg(False, "the checks want a gradient everywhere, and A has none while B is 0")


class Adapted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.A), self.B)


def adapt(cfg, gpt, _):
    """In place of freeze_layers; train_rm.py takes it, too."""
    gpt.requires_grad_(False)
    for m in [m for m in gpt.h.modules() if type(m) is nn.Linear]:
        m.__class__, m.scale = Adapted, cfg.alpha / cfg.rank
        m.A = nn.Parameter(torch.randn(cfg.rank, m.in_features) * m.in_features**-0.5)
        m.B = nn.Parameter(torch.zeros(m.out_features, cfg.rank))


def main(cfg):
    run = replace(cfg, out_dir=f"{cfg.out_dir}/adapters")
    result = train_sft.main(run, freeze=partial(adapt, cfg))
    best = checkpoint.load(run.out_dir, "lm")
    for name in [n.removesuffix(".A") for n in best.weights if n.endswith(".A")]:
        A, B = best.weights.pop(f"{name}.A"), best.weights.pop(f"{name}.B")
        best.weights[f"{name}.weight"] += cfg.alpha / cfg.rank * B @ A
    parts = best.step, best.weights, {}, best.tokenizer, best.model_config, best.step
    checkpoint.set_aside(Path(cfg.out_dir))  # an earlier run's, of perhaps the same step
    checkpoint.save(cfg, "lora", *parts, {"user_turns": best.config["user_turns"]})
    return result


if __name__ == "__main__":
    main(from_cli(Config))
