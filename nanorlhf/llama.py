"""The Llama family, beside GPT-2: what changed between 2019 and now, and what is the same.

| | GPT-2 (model.py) | Llama, SmolLM2, Qwen (here) |
|---|---|---|
| norm | LayerNorm: mean, spread, weight, bias | RMSNorm: size and weight (arXiv:1910.07467) |
| positions | a learned vector each, added once | queries and keys are rotated (arXiv:2104.09864) |
| attention | as many keys as queries | a key for several queries (GQA, arXiv:2305.13245) |
| MLP | GELU, 4 times as wide | SwiGLU (arXiv:2002.05202) |
| biases | everywhere | none; in Qwen2.5 of queries, keys and values |

Shapes as in model.py; G heads of keys and values, E the width of a head, F that of the MLP.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanorlhf import model
from nanorlhf.model import GPT, Block, GPTConfig

# the keys of Llama 3.1's rope_scaling
SCALING = "factor low_freq_factor high_freq_factor original_max_position_embeddings".split()


@dataclass
class LlamaConfig(GPTConfig):
    n_kv_head: int = 4  # G, a divisor of n_head
    d_head: int = 32  # E; in Qwen3 n_head * E is not the width
    d_mlp: int = 384  # F
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3.1's, see `frequencies`
    qkv_bias: bool = False  # Qwen2.5
    qk_norm: bool = False  # Qwen3
    nope_every: int = 0  # SmolLM3: in each n-th block nothing is rotated
    is_tied: bool = True  # the head is the embedding

    @property
    def cache_heads(self):
        return self.n_kv_head, self.d_head

    def build(self):
        return Llama(self)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension, in float32 or better."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def frequencies(config, device):
    """How far each pair of a head's dimensions turns per position, in radians: theta^(-2i/E),
    (E/2,). Llama 3.1 and later stretch what turns slowly, so that longer texts fit: a pair that
    turns less than `low_freq_factor` times within the original context, by `factor`; more than
    `high_freq_factor` times, not at all; between them, by a linear mixture."""
    steps = torch.arange(0, config.d_head, 2, device=device).float() / config.d_head
    turn = config.rope_theta**-steps
    if (scaling := config.rope_scaling) is None:
        return turn
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * turn / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return turn * (kept + (1 - kept) / scaling["factor"])


def rotate(x, rotation):
    """Turn each pair (x_i, x_{i+E/2}) of x (B, H, T, E) by the angle of its position. `rotation`:
    the cosine and sine of these angles, each (T, E/2) or (B, 1, T, E/2)."""
    (cos, sin), (a, b) = rotation, x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class GroupedAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        c, self.dropout = config, config.dropout
        self.sizes = [n * c.d_head for n in (c.n_head, c.n_kv_head, c.n_kv_head)]
        self.c_attn = nn.Linear(c.d_model, sum(self.sizes), bias=c.qkv_bias)
        self.c_proj = nn.Linear(self.sizes[0], c.d_model, bias=False)
        norm = lambda: RMSNorm(c.d_head, c.norm_eps) if c.qk_norm else nn.Identity()
        self.d_head, self.q_norm, self.k_norm = c.d_head, norm(), norm()
        self.nope_every = c.nope_every

    def forward(self, x, rotation, bias, past, layer):
        B, T, _ = x.shape
        q, k, v = (y.view(B, T, -1, self.d_head) for y in self.c_attn(x).split(self.sizes, -1))
        q, k = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2)
        v = v.transpose(1, 2)
        if not self.nope_every or (layer + 1) % self.nope_every:
            q, k = rotate(q, rotation), rotate(k, rotation)  # (B, H or G, T, E)
        if past is not None:
            k, v = past.extend(k, v)
        dropout = self.dropout if self.training else 0.0
        y = model.attention(q, k, v, bias, dropout)  # (B, H, T, E)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, -1))


class SwiGLU(nn.Module):
    """W_out (silu(W_gate x) * W_up x), the first two side by side in c_fc."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.d_model, 2 * config.d_mlp, bias=False)
        self.c_proj = nn.Linear(config.d_mlp, config.d_model, bias=False)

    def forward(self, x):
        gate, up = self.c_fc(x).chunk(2, -1)  # (B, T, F)
        return self.c_proj(F.silu(gate) * up)


class LlamaBlock(Block):
    attention, mlp_of = GroupedAttention, SwiGLU

    @staticmethod
    def norm(config):
        return RMSNorm(config.d_model, config.norm_eps)


class Llama(GPT):
    """Llama: rotary positions, RMSNorm, no biases, SwiGLU, grouped-query attention."""

    block = LlamaBlock

    def add_ends(self, config):
        if not config.is_tied:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def drop_head(self):
        if not self.config.is_tied:
            self.lm_head = None

    @property
    def ends(self):
        head = None if self.config.is_tied else self.lm_head
        return [self.wte] if head is None else [self.wte, head]

    @property
    def head_weight(self):
        return (self.wte if self.config.is_tied else self.lm_head).weight

    def embed(self, tokens, positions):
        return self.drop(self.wte(tokens))  # (B, T, D)

    def rotation(self, x, positions):
        """Cosine and sine of the angles at positions (B, T), by default 0..T-1 of x (B, T, D)."""
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)  # (T,)
        turn = frequencies(self.config, x.device)  # (E/2,)
        angles = positions[..., None].float() * turn  # (T, E/2) or (B, T, E/2)
        angles = angles[:, None] if angles.dim() == 3 else angles
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def sized(vocab_size, block_size, n_layer, n_head, d_model, dropout):
    """The config of a Llama from scratch. SwiGLU has three matrices where GPT-2's MLP has two, so
    its width is 8/3 instead of 4 times d_model: as many weights."""
    common = (vocab_size, block_size, n_layer, n_head, d_model, dropout)
    d_mlp = -(-8 * d_model // 3 // 32) * 32
    return LlamaConfig(*common, n_kv_head=n_head, d_head=d_model // n_head, d_mlp=d_mlp)
