"""A model plus randomness: generation.

Shapes: B rows, P prompt positions, T response positions, V vocabulary entries.
"""

import numpy as np
import torch
from tqdm import tqdm

from nanorlhf.batches import pad
from nanorlhf.model import KVCache

CHECK_EVERY = 16  # tokens between looks at which rows have ended: a look waits for the GPU


def response_mask(responses, eos_id):
    """(B, T) bool: True up to and including the first eos of each row."""
    is_eos = responses == eos_id
    return is_eos.cumsum(1) - is_eos.long() == 0


def uniforms(seed, step, rows, T):
    """One number in [0, 1) per row and position, (len(rows), T) float32, keyed by (seed, step,
    global row): a row's noise is the same in any batch and on any rank."""
    keys = [[(seed << 32) + step, row] for row in rows]
    noise = [np.random.Generator(np.random.Philox(key=k)).random(T, np.float32) for k in keys]
    return torch.from_numpy(np.stack(noise))


@torch.no_grad()
def generate(
    gpt, prompts, prompt_mask, max_new_tokens, eos_id, pad_id, noise,
    temperature=1.0, top_k=0, top_p=1.0,
):  # fmt: skip
    """Continue left-padded prompts (B, P) -> responses (B, T), T <= max_new_tokens.

    noise (B, max_new_tokens) from `uniforms`; temperature 0 takes the likeliest token instead.
    A response ends with its eos, then come pads; T is the longest response. top_k and top_p are
    for chat: a rollout that samples filtered and scores unfiltered has a biased KL.
    """
    (B, P), device = prompts.shape, prompts.device
    cache = KVCache(gpt.config, B, device, gpt.wte.weight.dtype)
    mask = torch.ones(B, P + max_new_tokens, dtype=torch.bool, device=device)
    mask[:, :P] = prompt_mask
    noise = noise.to(device)
    responses = torch.full((B, max_new_tokens), pad_id, device=device)
    rows = torch.arange(B, device=device)  # of the batch that are still being written
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    tokens = prompts
    for t in range(max_new_tokens):
        hidden = gpt.hidden(tokens, mask[:, : P + t], cache)[:, -1]  # (B, D)
        token = sample(gpt.head(hidden), noise[:, t], temperature, top_k, top_p)  # (B,)
        responses[rows, t] = token.masked_fill(ended, pad_id)
        ended |= token == eos_id
        tokens = token[:, None]
        if (t + 1) % CHECK_EVERY == 0 and ended.sum() * 4 >= len(rows):  # ended rows leave
            going = ~ended
            if not going.any():
                break
            rows, noise, mask, tokens, ended = (
                x[going] for x in (rows, noise, mask, tokens, ended)
            )
            cache.keep(going)
    return responses[:, : int(response_mask(responses, eos_id).sum(1).max())]


def sample(logits, noise, temperature=1.0, top_k=0, top_p=1.0):
    """Inverse-CDF sampling: logits (B, V) and uniforms (B,) -> tokens (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = filtered((logits.float() / temperature).softmax(-1), top_k, top_p)
    cdf = probs.cumsum(-1)  # (B, V)
    # right=True: the first token whose cdf exceeds the noise, so never one of probability 0
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
    gpt, tokenizer, prompts, max_new_tokens, seed, step=0, temperature=1.0, top_k=0, top_p=1.0,
    chunk=512, progress="", eos_id=None,
):  # fmt: skip
    """Lists of prompt ids -> lists of response ids, each with its eos if it ended by itself.
    Row i of the list has noise (seed, step, i), whatever the chunk size."""
    device = gpt.wte.weight.device
    eos_id = tokenizer.eos_id if eos_id is None else eos_id
    found = []
    starts = range(0, len(prompts), chunk)
    for start in tqdm(starts, desc=progress, disable=None if progress else True, leave=False):
        rows = prompts[start : start + chunk]
        tokens, mask = pad(rows, tokenizer.pad_id, left=True)
        noise = uniforms(seed, step, range(start, start + len(rows)), max_new_tokens)
        responses = generate(
            gpt, tokens.to(device), mask.to(device), max_new_tokens, eos_id, tokenizer.pad_id,
            noise, temperature, top_k, top_p,
        )  # fmt: skip
        lengths = response_mask(responses, eos_id).sum(1).tolist()
        found += [row[:n] for row, n in zip(responses.tolist(), lengths)]
    return found
