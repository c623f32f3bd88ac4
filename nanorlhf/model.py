"""GPT-2, a reward model and an actor-critic. llama.py has what newer models do otherwise.

Shapes: B sequences, T positions, D width, H heads, V vocabulary entries. Of a rollout: b rows of S
positions, T of which belong to the response.
Parameters have GPT-2's names. Matrices are stored as nn.Linear stores them, so transposed.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nanorlhf.config import die
from nanorlhf.functional import exact
from nanorlhf.machine.compiled import compiled


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int = 256
    n_layer: int = 4
    n_head: int = 4
    d_model: int = 128
    dropout: float = 0.0
    gelu: str = "tanh"  # GPT-2's approximation, or "none": exact, and 3 times faster on a CPU

    @property
    def cache_heads(self):
        """(heads, their width) of the keys and values that a layer keeps for each position."""
        return self.n_head, self.d_model // self.n_head

    def build(self):
        """The language model of these sizes, with random weights."""
        return GPT(self)


def attention(q, k, v, bias, dropout):
    """softmax(q k^T / sqrt(D/H) + bias) v. q is (B, H, T, D/H), k and v are (B, H, S, D/H); bias
    is 0 or -inf and broadcasts to (B, H, T, S). Without a bias attention is causal. Where k and v
    have fewer heads, each serves the same number of q's, one after the other.

    PyTorch has a kernel for it. For bfloat16 on a CPU we write the formula out instead: at the
    lengths used here the kernel is 2 to 6 times slower, except for a single token, where it is
    twice as fast (torch 2.13, AVX-512 and AMX). Tensors on "meta" have no contents; they take the
    CPU's way.
    """
    (B, H, T, _), G, scale = q.shape, k.shape[1], q.shape[-1] ** -0.5
    if T == 1:  # the q's of one k are as rows of it
        y = F.scaled_dot_product_attention(q.reshape(B, G, H // G, -1), k, v, bias, dropout)
        return y.reshape(B, H, 1, -1)
    if q.device.type not in ("cpu", "meta") or q.dtype != torch.bfloat16:
        # (a plain H != G is no bool where --compile and --shard make H a symbol)
        kwargs = {"dropout_p": dropout, "is_causal": bias is None, "enable_gqa": not H == G}
        return F.scaled_dot_product_attention(q, k, v, bias, **kwargs)
    q = q.reshape(B * G, H // G * T, -1)
    k, v = k.flatten(0, 1), v.flatten(0, 1)  # (B * G, S, D/H)
    if bias is None:
        bias = additive(torch.ones(T, T, dtype=torch.bool, device=q.device).tril(), q.dtype)
        bias = bias.repeat(H // G, 1).expand(B * G, -1, T)
        scores = torch.baddbmm(bias, q, k.mT, alpha=scale)
    else:
        scores = torch.bmm(q * scale, k.mT)  # (B * G, H/G * T, S)
        scores.view(B, H, T, -1).add_(bias)
    return torch.bmm(F.dropout(scores.softmax(-1), dropout), v).view(B, H, T, -1)


def additive(allowed, dtype):
    """A bool mask as something to add: 0 where True, -inf where False."""
    return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, -torch.inf)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.d_model, 3 * config.d_model)
        self.c_proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, x, rotation, bias, past, layer):
        B, T, D = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = past.extend(k, v)
        dropout = self.dropout if self.training else 0.0
        y = attention(q, k, v, bias, dropout)  # (B, H, T, D/H)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config.gelu in ("tanh", "none"), f"gelu: {config.gelu!r}"
        self.gelu = config.gelu
        self.c_fc = nn.Linear(config.d_model, 4 * config.d_model)
        self.c_proj = nn.Linear(4 * config.d_model, config.d_model)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.gelu))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): norms come first, as in GPT-2."""

    attention, mlp_of = Attention, MLP

    @staticmethod
    def norm(config):
        return nn.LayerNorm(config.d_model, eps=1e-5)

    def __init__(self, config):
        super().__init__()
        self.ln_1, self.attn = self.norm(config), self.attention(config)
        self.ln_2, self.mlp = self.norm(config), self.mlp_of(config)
        self.drop = nn.Dropout(config.dropout)

    def add(self, x, rotation=None, bias=None, past=None, layer=0):
        x = x + self.drop(self.attn(self.ln_1(x), rotation, bias, past, layer))
        return x + self.drop(self.mlp(self.ln_2(x)))

    forward = compiled(add)


class GPT(nn.Module):
    """GPT-2: learned positions, pre-LayerNorm, biases, GELU, head tied to the embedding."""

    block = Block

    def __init__(self, config):
        super().__init__()
        self.config, self.grad_checkpointing = config, False
        self.n_frozen = 0  # embeddings and blocks that `freeze_layers` froze
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.add_ends(config)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(self.block(config) for _ in range(config.n_layer))
        self.ln_f = self.block.norm(config)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                # GPT-2: N(0, 0.02) at width 768, residual projections scaled by 1/sqrt(residual
                # layers). A narrow model learns faster with the same variance of its sums
                std = 0.02 * math.sqrt(768 / config.d_model)
                scale = math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(p, std=std / scale)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def add_ends(self, config):
        """What stands before and behind the blocks, beside the embedding: learned positions."""
        assert config.d_model % config.n_head == 0, f"{config.d_model=} % {config.n_head=} != 0"
        self.wpe = nn.Embedding(config.block_size, config.d_model)

    def drop_head(self):
        """Forget what only a language model needs, which here is nothing: the head is `wte`."""

    @property
    def ends(self):
        """The modules that `freeze_layers` freezes with the first blocks."""
        return [self.wte, self.wpe]

    @property
    def head_weight(self):
        """The head's matrix (V, D): the embedding's."""
        return self.wte.weight

    @property
    def device(self):
        return self.wte.weight.device

    @property
    def dtype(self):
        return self.wte.weight.dtype

    def forward(self, tokens, cache=None):
        """Next-token logits (B, T, V) of tokens (B, T); see `hidden` for the arguments."""
        return self.head(self.hidden(tokens, cache))

    def head(self, hidden):
        """Logits (..., V) of hidden states (..., D)."""
        return F.linear(hidden, self.head_weight)

    def hidden(self, tokens, cache=None):
        """Final hidden states (B, T, D) of tokens (B, T).

        Without a cache, rows are padded on the right, where causal attention never looks, so no
        mask is needed. With a cache, the tokens continue those in it, and rows are padded on the
        left. Positions count real tokens only, so padding changes no logit. A pad attends to
        itself, because the softmax of a row in which everything is masked would be nan.
        """
        if cache is None:
            return self.above(self.trunk(tokens, 0), 0)  # 0: all blocks run in `above`
        slots, pads = cache.places(tokens.shape[1]), cache.pads[:, None]  # (T,), (B, 1)
        key = torch.arange(cache.length, device=tokens.device)  # (R,)
        allowed = (key <= slots[:, None]) & (key >= pads[..., None]) | (key == slots[:, None])
        bias = additive(allowed[:, None], cache.keys.dtype)  # (B, 1, T, R)
        positions = (slots - pads).clamp(0, self.config.block_size - 1)  # (B, T)
        x = self.embed(tokens, positions)
        return self.ln_f(self.blocks(x, bias, cache, positions=positions))

    def embed(self, tokens, positions):
        return self.drop(self.wte(tokens) + self.wpe(positions))  # (B, T, D)

    def rotation(self, x, positions):
        """What attention is told of positions: nothing, as `embed` has added them."""

    def blocks(self, x, bias=None, cache=None, first=0, last=None, positions=None):
        """Blocks first..last-1 on x (B, T, D), whose positions are 0..T-1 where none are given. T
        is padded to a multiple of 8: for every new shape of a bfloat16 product a CPU compiles a
        kernel, which takes longer than the product, and tensor cores are faster at such sizes,
        too."""
        T = x.shape[1]
        x = F.pad(x, (0, 0, 0, -T % 8)) if cache is None and T % 8 else x
        rotation = self.rotation(x, positions)
        for layer, block in list(enumerate(self.h))[first:last]:
            args = x, rotation, bias, cache and cache.of(layer), layer
            if self.grad_checkpointing and torch.is_grad_enabled() and cache is None:
                # keep only the block's input, and recompute the rest in the backward pass
                x = checkpoint(block, *args, use_reentrant=False)
            else:
                # a growing cache has a new length, and so no compiled code, for every token
                x = block(*args) if cache is None or cache.static else block.add(*args)
        return x[:, :T] if T < x.shape[1] else x  # a view would be compiled once more

    def trunk(self, tokens, n):
        """What the embeddings and the first n blocks make of right-padded tokens (B, T):
        (B, T, D)."""
        T = tokens.shape[1]
        assert T <= self.config.block_size, f"{T} positions of {self.config.block_size}"
        positions = torch.arange(T, device=tokens.device)
        return self.blocks(self.embed(tokens, positions), last=n)

    def above(self, x, n):
        """The other blocks and the final norm: `trunk`'s result x -> hidden states (B, T, D)."""
        return self.ln_f(self.blocks(x, first=n))

    def in_states(self, rows):
        """The final hidden states (b, T, D) from which the response tokens were sampled.

        rows["tokens"] (b, S) are prompt and response, padded on the right; rows["states"] (b, T)
        are the positions of these states: each is the one before its token. If rows["trunk"] holds
        what the frozen layers made of the tokens, these layers do not run again.
        """
        n = self.n_frozen
        hidden = self.above(rows["trunk"], n) if "trunk" in rows else self.hidden(rows["tokens"])
        return at(hidden, rows["states"])


class RewardModel(nn.Module):
    """A GPT with one linear unit on its final hidden state: a scalar for (prompt, response).
    Scores are standardised, (raw - mean) / sd. Both constants are measured after training; until
    then they are 0 and 1."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt
        gpt.drop_head()
        self.score_head = nn.Linear(gpt.config.d_model, 1)
        nn.init.normal_(self.score_head.weight, std=1 / math.sqrt(gpt.config.d_model + 1))
        nn.init.zeros_(self.score_head.bias)
        self.register_buffer("score_mean", torch.tensor(0.0))
        self.register_buffer("score_sd", torch.tensor(1.0))

    def set_unit(self, mean, sd):
        """Standardise raw scores by these from now on."""
        self.score_mean.fill_(mean)
        self.score_sd.fill_(sd)

    def forward(self, tokens):
        """The head's output at every position: (B, T), float32. It is trained at the end token
        only, where `score` reads it; a separate critic starts from it at all positions."""
        raw = scalar(self.score_head, self.gpt.hidden(tokens))
        return (raw - self.score_mean) / self.score_sd

    def score(self, tokens, mask):
        """Scores (B,) at the last real token of each row (its eos); pads on the right, where the
        mask (B, T) is False."""
        return self(tokens).gather(1, mask.sum(1, keepdim=True) - 1)[:, 0]


class ActorCritic(nn.Module):
    """The policy and its value function, which is one of these:

    "shared"         a linear unit on the policy's own hidden states, zero at first
    a RewardModel    a network of its own: --critic separate
    "none"           no value function: `forward` returns None for the values
    """

    def __init__(self, gpt, critic="shared"):
        super().__init__()
        self.gpt, self.critic = gpt, critic if isinstance(critic, RewardModel) else None
        self.value_head = None
        if critic == "shared":
            self.value_head = nn.Linear(gpt.config.d_model, 1)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    def forward(self, rows):
        """Logits (b, T, V) and values (b, T) of some rows of a rollout, at the position before
        each response token, where that token was sampled. See `GPT.in_states`."""
        hidden = self.gpt.in_states(rows)  # (b, T, D)
        values = None
        if self.value_head is not None:
            values = scalar(self.value_head, hidden)
        elif self.critic is not None:
            values = at(self.critic(rows["tokens"])[..., None], rows["states"])[..., 0]
        return self.gpt.head(hidden), values


def scalar(head, hidden):
    """A linear unit on hidden states (..., D) -> (...), in float32 at least. In bfloat16, which has
    eight bits for a number, a quarter of 512 responses would share their score with another."""
    return F.linear(exact(hidden), exact(head.weight), exact(head.bias))[..., 0]


def at(hidden, states):
    """hidden (b, S, D) at the positions `states` (b, T): (b, T, D)."""
    states = states.clamp(max=hidden.shape[1] - 1)  # pads of a short response may lie beyond S
    return hidden.gather(1, states[..., None].expand(-1, -1, hidden.shape[-1]))


def freeze_layers(gpt, n):
    """Freeze blocks 0..n-1, the embeddings and, as it is the same matrix, the head. n = 0 freezes
    nothing."""
    if not 0 <= n <= gpt.config.n_layer:
        die(f"--freeze_layers {n}: the model has {gpt.config.n_layer} blocks")
    gpt.n_frozen = n
    if n:
        for module in (*gpt.ends, *gpt.h[:n]):
            module.requires_grad_(False)


def frozen_reference(gpt):
    """A frozen copy of a GPT that shares, and does not copy, whatever is frozen already."""
    shared = {id(p): p for p in gpt.parameters() if not p.requires_grad}
    return copy.deepcopy(gpt, memo=shared).requires_grad_(False).eval()
