"""LoRA (arXiv:2106.09685), a fork of stages 2, 3 and 4. The model stays as it is; beside each
matrix W of a block stand two thin ones, and only these learn, beside a head of scores or values:

    y = W x + alpha / rank * B A x,    A (rank, in) random, B (out, rank) zero at first

    python -m experiments.train_lora                    # stage 2, SFT
    python -m experiments.train_lora rm                 # stage 3, the reward model
    python -m experiments.train_lora ppo --reward out/lora_rm    # stage 4
    python -m nanorlhf evaluate --models lora=out/lora

PPO's reference is the base model: it shares every W with the policy, and its own B stay 0. So there
is one copy of the model, and AdamW has state for the thin matrices alone. A checkpoint holds W, A
and B, from which --resume goes on; whatever else reads it gets W + alpha / rank * B A, an ordinary
model.
"""

import sys
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

import train_ppo
import train_rm
import train_sft
from nanorlhf.config import arg, from_cli, gone


@dataclass
class Adapters:
    """The flags of all three. What would freeze or split a whole model has no use here."""

    rank: int = arg(8, "rows of A, columns of B")
    alpha: float = arg(16.0, "scale of what is added, times the rank")
    freeze_layers: int = gone(0)
    shard: bool = gone(False)


@dataclass
class Config(Adapters, train_sft.Config):
    """SFT that trains thin matrices beside the model's own."""

    script = train_sft
    out_dir: str = arg("out/lora", "folder for this stage's checkpoints, metrics and samples")
    learning_rate: float = arg(1e-2, "peak learning rate")


@dataclass
class RMConfig(Adapters, train_rm.Config):
    """A reward model that trains thin matrices and its head."""

    script = train_rm
    out_dir: str = arg("out/lora_rm", "folder for this stage's checkpoints, metrics and report")
    learning_rate: float = arg(3e-3, "peak learning rate")


@dataclass
class PPOConfig(Adapters, train_ppo.Config):
    """PPO that trains thin matrices and the value function; the base model is the reference."""

    script = train_ppo
    out_dir: str = arg("out/lora_ppo", "folder for this stage's checkpoints, metrics and samples")
    learning_rate: float = arg(3e-3, "at the start; falls linearly to 0 over the iterations")


STAGES = {"sft": Config, "rm": RMConfig, "ppo": PPOConfig}


class Adapted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.A), self.B)


def adapt(cfg, gpt, _):
    """In place of freeze_layers: freeze the model, and put A and B beside each matrix."""
    gpt.requires_grad_(False)
    for m in [m for m in gpt.h.modules() if type(m) is nn.Linear]:
        m.__class__ = Adapted
        m.register_buffer("scale", torch.tensor(cfg.alpha / cfg.rank))
        m.A = nn.Parameter(torch.randn(cfg.rank, m.in_features) * m.in_features**-0.5)
        m.B = nn.Parameter(torch.zeros(m.out_features, cfg.rank))


def main(cfg):
    return cfg.script.main(cfg, freeze=partial(adapt, cfg))


if __name__ == "__main__":
    stage = sys.argv.pop(1) if sys.argv[1:2] and sys.argv[1] in STAGES else "sft"
    main(from_cli(STAGES[stage]))
