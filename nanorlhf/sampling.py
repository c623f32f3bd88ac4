"""A model plus randomness: generation.

Shapes: B rows, P prompt positions, T response positions (in KVCache: new positions), V vocabulary
entries, H attention heads, D width.
"""

from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from nanorlhf.data.batches import pad

# Tokens between two looks at which rows have ended: (with a growing cache, with a static one)
STRIDE = (16, 64)


def is_static(device):
    """Whether the cache on this device is static, as CUDA graphs need it: see KVCache."""
    return device.type == "cuda"


class Past(NamedTuple):
    """One layer's part of a KVCache. A compiled block writes to these tensors in place, where it
    would copy them as a part of all layers' keys and values."""

    keys: torch.Tensor  # (B, H, room, D/H)
    values: torch.Tensor
    where: torch.Tensor | slice  # the reserved positions
    length: int  # how many positions are read

    def extend(self, k, v):
        """Write new keys and values (B, H, T, D/H); returns all that attention reads."""
        self.keys[:, :, self.where] = k
        self.values[:, :, self.where] = v
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class KVCache:
    """Keys and values of every layer for B left-padded sequences of at most `room` positions.

    Attention reads the first `length` positions. A growing cache (CPU) makes `length` larger with
    each token. A static cache (GPU) keeps it fixed for many tokens, masks the positions that are
    not written yet, and counts the written ones in a tensor, `used`: then a step for the next
    token is the same operations on the same memory, and a CUDA graph of it can be replayed.
    """

    def __init__(self, config, pads, room, dtype):
        n_head, d_head = config.cache_heads
        shape = (config.n_layer, len(pads), n_head, room, d_head)
        self.keys = torch.zeros(shape, device=pads.device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.pads, self.length = pads, 0  # pads (B,): how many stand on the left of each row
        self.static = is_static(pads.device)
        self.used = torch.zeros(1, device=pads.device, dtype=torch.long)  # (1,)

    def reach(self, length):
        """Let attention read this many positions of a static cache from now on."""
        if self.static:
            self.length = length

    def places(self, T):
        """Reserve the next T positions and return them, (T,)."""
        slots = self.where = self.used + torch.arange(T, device=self.used.device)
        self.used += T
        if not self.static:
            self.where = slice(self.length, self.length + T)  # faster than writing by index
            self.length += T
        return slots

    def of(self, layer):
        return Past(self.keys[layer], self.values[layer], self.where, self.length)

    def keep(self, rows):
        """Keep these rows and drop the others."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.pads = self.pads[rows]


def is_end(tokens, ends):
    """Which tokens, of any shape, are among the ids that end a response; bool."""
    return (tokens[..., None] == torch.as_tensor(ends, device=tokens.device)).any(-1)


def response_mask(responses, ends):
    """(B, T) bool: True up to and including the first eos of each row. ends: the ids that are one;
    some models have several."""
    is_eos = is_end(responses, ends)
    return is_eos.cumsum(1) - is_eos.long() == 0


def uniforms(seed, step, rows, T):
    """One uniform number in [0, 1) for each row and position: (len(rows), T), float32. The
    generator of a row is keyed by (seed, step, row), row being its index among all rows of the
    step. So its noise is the same in any batch and on any number of GPUs."""
    keys = [[(seed << 32) + step, row] for row in rows]
    noise = [np.random.Generator(np.random.Philox(key=k)).random(T, np.float32) for k in keys]
    return torch.from_numpy(np.stack(noise))


@torch.no_grad()
def generate(
    gpt, prompts, mask, max_new_tokens, ends, pad_id, noise, temperature=1.0, top_k=0, top_p=1.0
):
    """Continue left-padded prompts (B, P), mask (B, P) -> responses (B, T), T <= max_new_tokens.

    noise (B, max_new_tokens) comes from `uniforms`; temperature 0 takes the likeliest token
    instead. A response ends with its eos, one of `ends`, and pads follow; T is the length of the
    longest one.
    top_k and top_p are for chat: in a rollout, sampling filtered and scoring unfiltered would bias
    the KL.
    """
    (B, P), device = prompts.shape, prompts.device
    cache = KVCache(gpt.config, P - mask.sum(1), P + max_new_tokens, gpt.dtype)
    ends = torch.as_tensor(ends, device=device)
    rows = torch.arange(B, device=device)  # indices of the rows that are still being written
    now = torch.zeros(1, dtype=torch.long, device=device)  # tokens written so far
    new = lambda *shape: torch.full(shape, pad_id, device=device)
    responses, ended = new(B, max_new_tokens), torch.zeros(B, dtype=torch.bool, device=device)
    state = {
        "noise": noise.to(device),
        "ended": ended,
        "last": new(B, 1),
        "written": new(B, max_new_tokens),
    }

    def step(tokens):
        hidden = gpt.hidden(tokens, cache)[:, -1]  # (B, D)
        u = state["noise"].index_select(1, now)[:, 0]
        token = sample(gpt.head(hidden), u, temperature, top_k, top_p)[:, None]  # (B, 1)
        token.masked_fill_(state["ended"][:, None], pad_id)
        state["written"].index_copy_(1, now, token)
        state["ended"] |= is_end(token[:, 0], ends)
        state["last"].copy_(token)
        now.add_(1)

    for t in range(0, max_new_tokens, STRIDE[cache.static]):
        n = min(STRIDE[cache.static], max_new_tokens - t)
        cache.reach(P + t + n)
        if t == 0:
            step(prompts)
        repeat(lambda: step(state["last"]), n - (t == 0), device)
        responses[rows] = state["written"]
        going = int((~state["ended"]).sum())  # here the CPU waits for the device
        size = -(-going // 32) * 32
        if going == 0:
            break
        if size * 4 <= 3 * len(rows):  # drop ended rows, but keep a multiple of 32
            kept = state["ended"].long().argsort(stable=True)[:size]
            state, rows = {k: x[kept] for k, x in state.items()}, rows[kept]
            cache.keep(kept)
    return responses[:, : int(response_mask(responses, ends).sum(1).max())]


@torch.no_grad()
def stream(gpt, prompt, max_new_tokens, ends, noise, temperature=1.0, top_k=0, top_p=1.0):
    """Yields the ids of one response as they are sampled, the last of them its eos where it ends by
    itself: those of `generate`. prompt (1, P), noise (1, max_new_tokens)."""
    room = prompt.shape[1] + max_new_tokens
    pads = torch.zeros(1, dtype=torch.long, device=prompt.device)
    cache, noise = KVCache(gpt.config, pads, room, gpt.dtype), noise.to(prompt.device)
    for t in range(max_new_tokens):
        cache.reach(room)
        hidden = gpt.hidden(prompt, cache)[:, -1]  # (1, D)
        token = sample(gpt.head(hidden), noise[:, t], temperature, top_k, top_p)  # (1,)
        yield int(token)
        if int(token) in ends:
            return
        prompt = token[:, None]  # the rest is in the cache


def repeat(step, n, device):
    """Call step() n times. On a GPU a CUDA graph of the step is recorded once and replayed: the
    hundreds of small kernels of a step are launched together, and none waits for Python. So a step
    must read and write the same tensors every time."""
    if not is_static(device) or n < 8:  # recording costs about as much as two steps
        for _ in range(n):
            step()
        return
    step()  # a first call sets things up, which must not become part of the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(n - 1):
        graph.replay()


def sample(logits, noise, temperature=1.0, top_k=0, top_p=1.0):
    """Inverse-CDF sampling: logits (B, V) and uniforms (B,) -> tokens (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = filtered((logits.float() / temperature).softmax(-1), top_k, top_p)
    cdf = probs.cumsum(-1)  # (B, V)
    # right=True takes the first token whose cdf exceeds the noise: never one of probability 0
    tokens = torch.searchsorted(cdf, noise[:, None] * cdf[:, -1:], right=True)
    return tokens[:, 0].clamp(max=logits.shape[-1] - 1)


def filtered(probs, top_k=0, top_p=1.0):
    """Zero all but the k likeliest tokens, and all but the fewest that hold probability top_p
    (arXiv:1904.09751); (B, V) -> (B, V), not normalised. 0 and 1.0 switch the filters off."""
    if top_k:
        smallest = probs.topk(min(top_k, probs.shape[-1])).values[:, -1:]
        probs = probs.masked_fill(probs < smallest, 0)
    if top_p < 1:
        ordered, index = probs.sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # probability of all likelier tokens
        drop = torch.zeros_like(probs, dtype=torch.bool)
        drop.scatter_(1, index, before >= top_p * probs.sum(-1, keepdim=True))
        probs = probs.masked_fill(drop, 0)
    return probs


def sample_responses(
    gpt,
    tokenizer,
    prompts,
    max_new_tokens,
    seed,
    step=0,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    chunk=512,
    progress="",
    ends=None,
):
    """Lists of prompt ids -> lists of response ids, each with its eos if it ended by itself.
    Row i of the list has noise (seed, step, i), whatever the chunk size."""
    device = gpt.device
    ends = tokenizer.ends if ends is None else ends
    sampled = []
    starts = range(0, len(prompts), chunk)
    for start in tqdm(starts, desc=progress, disable=None if progress else True, leave=False):
        rows = prompts[start : start + chunk]
        tokens, mask = pad(rows, tokenizer.pad_id, left=True)
        noise = uniforms(seed, step, range(start, start + len(rows)), max_new_tokens)
        padded, filters = (tokens.to(device), mask.to(device)), (temperature, top_k, top_p)
        responses = generate(gpt, *padded, max_new_tokens, ends, tokenizer.pad_id, noise, *filters)
        lengths = response_mask(responses, ends).sum(1).tolist()
        sampled += [row[:n] for row, n in zip(responses.tolist(), lengths)]
    return sampled
