"""GPT-2, a reward model and an actor-critic.

Shapes: B sequences, T positions, P prompt positions, D width, H heads, V vocabulary entries.
Parameter names are GPT-2's own (matrices stored as nn.Linear does, so transposed).
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int = 256
    n_layer: int = 4
    n_head: int = 4
    d_model: int = 128
    dropout: float = 0.0


class KVCache:
    """Keys and values of every layer, allocated `block` positions of B sequences at a time: the
    matrix product reads one contiguous piece, where a slice of a longer one would be copied."""

    def __init__(self, config, batch, device, dtype, block=64):
        shape = (config.n_layer, batch, config.n_head, 0, config.d_model // config.n_head)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.used, self.block = 0, block  # positions filled so far

    def room_for(self, length):
        """Make room for `length` positions; returns how many there are now."""
        if length > self.keys.shape[3]:
            grow = (0, 0, 0, -(-length // self.block) * self.block - self.keys.shape[3])
            self.keys, self.values = F.pad(self.keys, grow), F.pad(self.values, grow)
        return self.keys.shape[3]

    def extend(self, layer, k, v):
        """Append (B, H, T, D/H) to a layer; returns keys and values of all positions there is
        room for, zeros where none was written yet."""
        end = self.used + k.shape[2]
        self.keys[layer, :, :, self.used : end] = k
        self.values[layer, :, :, self.used : end] = v
        return self.keys[layer], self.values[layer]

    def keep(self, rows):
        """Drop the sequences where rows (B,) is False."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]


def attention(q, k, v, allowed, dropout):
    """softmax(q k^T / sqrt(D/H)) v for q, k, v (B, H, T or S, D/H); allowed None is causal.

    PyTorch's kernel, but for bfloat16 on a CPU, where that kernel is 2 to 6 times slower than
    the formula at the lengths used here (measured with torch 2.13 on AVX-512). "meta", a tensor
    without contents, is a CPU's as well.
    """
    causal = allowed is None and q.shape[2] > 1
    if q.device.type not in ("cpu", "meta") or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, dropout_p=dropout, is_causal=causal
        )
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, T, S)
    if causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if allowed is not None:  # a bias and not masked_fill: its backward pass is free
        scores += torch.zeros_like(allowed, dtype=q.dtype).masked_fill_(~allowed, -torch.inf)
    return F.dropout(scores.softmax(-1), dropout) @ v


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.d_model, 3 * config.d_model)
        self.c_proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, x, allowed, cache, layer):
        B, T, D = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        y = attention(q, k, v, allowed, self.dropout if self.training else 0.0)  # (B, H, T, D/H)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): norms come first, as in GPT-2."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.d_model, eps=1e-5)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.d_model, eps=1e-5)
        c_fc = nn.Linear(config.d_model, 4 * config.d_model)
        c_proj = nn.Linear(4 * config.d_model, config.d_model)
        self.mlp = nn.ModuleDict({"c_fc": c_fc, "c_proj": c_proj})
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, allowed=None, cache=None, layer=0):
        x = x + self.drop(self.attn(self.ln_1(x), allowed, cache, layer))
        h = F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate="tanh")
        return x + self.drop(self.mlp.c_proj(h))


class GPT(nn.Module):
    """GPT-2: learned positions, pre-LayerNorm, biases, tanh GELU, head tied to the embedding."""

    def __init__(self, config):
        super().__init__()
        assert config.d_model % config.n_head == 0, f"{config.d_model=} % {config.n_head=} != 0"
        self.config, self.grad_checkpointing = config, False
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.wpe = nn.Embedding(config.block_size, config.d_model)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.d_model, eps=1e-5)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                # GPT-2: N(0, 0.02) at width 768, residual projections scaled by 1/sqrt(residual
                # layers). A narrow model learns faster with the same variance of its sums
                std = 0.02 * math.sqrt(768 / config.d_model)
                scale = math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(p, std=std / scale)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens, attention_mask=None, cache=None):
        """Next-token logits (B, T, V) of tokens (B, T); see `hidden` for the arguments."""
        return self.head(self.hidden(tokens, attention_mask, cache))

    def head(self, hidden):
        """Logits (..., V) of hidden states (..., D), with the embedding as the matrix."""
        return F.linear(hidden, self.wte.weight)

    def hidden(self, tokens, attention_mask=None, cache=None):
        """Final hidden states (B, T, D) of tokens (B, T).

        attention_mask: bool, True for real tokens, (B, T), or (B, cached + T) with a cache; None
        where nothing is padded. Positions count real tokens only, so left padding changes no
        logit. A pad may attend to itself: a row with nothing to attend to would be nan.
        """
        past = cache.used if cache is not None else 0
        S = past + tokens.shape[1]
        assert S <= self.config.block_size or attention_mask is not None, f"{S} positions"
        room = cache.room_for(S) if cache is not None else S  # R
        key = torch.arange(room, device=tokens.device)
        causal = key <= key[past:S, None]  # (T, R)
        if attention_mask is None:
            positions, allowed = key[past:S], causal if cache is not None else None
        else:
            assert attention_mask.shape[1] == S, f"mask {attention_mask.shape}, {S} positions"
            # exclusive cumulative sum: the first real token stands at position 0
            positions = (attention_mask.cumsum(1) - attention_mask.long())[:, past:]  # (B, T)
            positions = positions.clamp(max=self.config.block_size - 1)  # only pads go past it
            itself = key == key[past:S, None]
            real = F.pad(attention_mask, (0, room - S))  # (B, R)
            allowed = ((causal & real[:, None, :]) | itself)[:, None]  # (B, 1, T, R)
        x = self.drop(self.wte(tokens) + self.wpe(positions))  # (B, T, D)
        for layer, block in enumerate(self.h):
            if self.grad_checkpointing and torch.is_grad_enabled() and cache is None:
                # keep the block's input alone and compute the rest again in the backward pass
                x = checkpoint(block, x, allowed, use_reentrant=False)
            else:
                x = block(x, allowed, cache, layer)
        if cache is not None:
            cache.used = S
        return self.ln_f(x)


class RewardModel(nn.Module):
    """A GPT whose last hidden state is read by one linear unit: a scalar per (prompt, response).
    Scores are standardised, (raw - mean) / sd, by two constants measured after training; until
    then they are 0 and 1."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt
        self.score_head = nn.Linear(gpt.config.d_model, 1)
        nn.init.normal_(self.score_head.weight, std=1 / math.sqrt(gpt.config.d_model + 1))
        nn.init.zeros_(self.score_head.bias)
        self.register_buffer("score_mean", torch.tensor(0.0))
        self.register_buffer("score_sd", torch.tensor(1.0))

    def forward(self, tokens, attention_mask):
        """The score if the text ended here, at every position: (B, T), float32."""
        raw = self.score_head(self.gpt.hidden(tokens, attention_mask))[..., 0].float()
        return (raw - self.score_mean) / self.score_sd

    def score(self, tokens, attention_mask):
        """Scores (B,) at the last real token of each row (its eos), padded left or right."""
        position = torch.arange(tokens.shape[1], device=tokens.device)
        last = position.masked_fill(~attention_mask, -1).argmax(1, keepdim=True)  # (B, 1)
        return self(tokens, attention_mask).gather(1, last)[:, 0]


class ActorCritic(nn.Module):
    """The policy and its value function, which reads the policy's own hidden states. With
    `critic`, a RewardModel, the value function is that separate network instead."""

    def __init__(self, gpt, critic=None):
        super().__init__()
        self.gpt, self.critic = gpt, critic
        if critic is None:
            self.value_head = nn.Linear(gpt.config.d_model, 1)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    def forward(self, tokens, attention_mask, P):
        """Logits (B, T, V) and values (B, T) of the T response tokens behind P prompt tokens.
        Both belong to the state in which a token is chosen: position P - 1 for the first."""
        hidden = self.gpt.hidden(tokens, attention_mask)[:, P - 1 : -1]  # (B, T, D)
        if self.critic is None:
            values = self.value_head(hidden)[..., 0].float()
        else:
            values = self.critic(tokens, attention_mask)[:, P - 1 : -1]
        return self.gpt.head(hidden), values


def freeze_layers(gpt, n):
    """Freeze the embeddings, with them the tied head, and blocks 0..n-1. n = 0 freezes nothing."""
    assert 0 <= n <= gpt.config.n_layer, f"cannot freeze {n} of {gpt.config.n_layer} layers"
    if n:
        for module in (gpt.wte, gpt.wpe, *gpt.h[:n]):
            module.requires_grad_(False)


def frozen_reference(gpt):
    """A frozen copy of a GPT that shares, and does not copy, whatever is frozen already."""
    shared = {id(p): p for p in gpt.parameters() if not p.requires_grad}
    return copy.deepcopy(gpt, memo=shared).requires_grad_(False).eval()
