"""Examples -> token ids -> batches.

Shapes: B examples, K completions of one prompt, T positions. A batch is a dict of tensors whose
first dimension is B, plus "source", where each example came from, for error messages. "weight"
(B,) is what an example counts for in a mean: its loss tokens, or 1.

The chat template, used by every stage after pretraining and defined here only:
<|user|>prompt<|assistant|>completion<|endoftext|>, repeated for several turns.
"""

import numpy as np
import torch

from nanorlhf.config import world_size
from nanorlhf.machine import ranks


def pad(rows, pad_id, left=False):
    """Lists of ids -> tokens (B, T), mask (B, T) bool, padded on the right, or on the left to a
    multiple of 8: shapes that come again are fast, see GPT.blocks."""
    T = max(map(len, rows))
    T += -T % 8 if left else 0
    tokens = torch.full((len(rows), T), pad_id)
    mask = torch.zeros(len(rows), T, dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(T - len(row), T) if left else slice(0, len(row))
        tokens[i, where] = torch.tensor(row, dtype=torch.long)
        mask[i, where] = True
    return tokens, mask


def split(batch, n):
    """A batch as n micro-batches of nearly equal numbers of rows."""
    size = -(-len(batch["weight"]) // n)
    for i in range(0, len(batch["weight"]), size):
        yield {k: v[i : i + size] for k, v in batch.items()}


def micro_batches(batch, cfg):
    """This process's micro-batches of a global batch. A batch that knows its lengths comes in
    groups of rows of about one length, where that saves work; but in one group with --shard,
    where all processes must do equally many forward passes."""
    parts = ranks.mine(split(batch, cfg.grad_accum * world_size()))
    return [rows for part in parts for rows in grouped(part, cfg)]


def grouped(batch, cfg):
    """One batch as such groups."""
    if "n_tokens" not in batch:
        return [batch]
    return [rows for _, rows in by_length(batch, 1 if cfg.shard else 2)]


def by_length(batch, n, always=False):
    """The tensors of a batch as n groups of rows of about one length, which saves most of the
    padding; yields (indices of the rows, group). One group, if not `always` n, where that would
    save less than a tenth. "n_tokens" (B,) cuts what is as wide as "tokens", "n_response" (B,)
    what is narrower."""
    tensors = {k: v for k, v in batch.items() if torch.is_tensor(v)}
    rounded = lambda lengths: -(-int(lengths.max()) // 8) * 8  # see GPT.blocks
    lengths = tensors["n_tokens"]
    whole = [lengths.argsort()]
    groups = whole[0].tensor_split(min(n, len(lengths)))
    cost = lambda groups: sum(len(i) * int(lengths[i[-1]]) for i in groups)
    for index in groups if always or cost(groups) <= 0.9 * cost(whole) else whole:
        rows, wide = {k: v[index] for k, v in tensors.items()}, tensors["tokens"].shape[1]
        for name, x in rows.items():
            if x.dim() > 1:
                cut = "n_tokens" if x.shape[1] == wide else "n_response"
                rows[name] = x[:, : rounded(rows[cut])]
        yield index, rows


def pads_last(tokens, real):
    """Rows with their pads, where real (B, T) is False, moved behind everything else, and cut to
    the longest: (B, S)."""
    order = (~real).long().argsort(dim=1, stable=True)
    return tokens.gather(1, order)[:, : int(real.sum(1).max())]


def epoch_batch(n, batch_size, seed, step):
    """Indices of the examples of one step: every epoch is a new permutation. Pure in its
    arguments, so exact resume needs no state. (Batches of one length would save padding, but where
    few answers are frequent, length gives the answer away and batches are no longer mixed.)"""
    epoch, step = divmod(step, -(-n // batch_size))
    order = np.random.default_rng([seed, epoch]).permutation(n)
    return order[step * batch_size : (step + 1) * batch_size]


def dialogue_batch(rows, indices, pad_id):
    """SFT: rows of (ids, is_loss, source) -> tokens (B, T), mask (B, T) of what is learned, and
    n_tokens (B,)."""
    ids, is_loss, source = zip(*(rows[i] for i in indices))
    mask = pad(is_loss, 0)[0].bool()
    weight = mask[:, 1:].sum(1).float()  # nothing predicts the first token
    n_tokens = torch.tensor([len(row) for row in ids])
    return {
        "tokens": pad(ids, pad_id)[0],
        "n_tokens": n_tokens,
        "mask": mask,
        "weight": weight,
        "source": list(source),
    }


def feedback_batch(rows, indices, pad_id):
    """RM: rows of ([ids per completion], target, source) -> tokens, mask (B, K, T), present,
    n_completion (tokens of each) and target (B, K). Absent completions have rank 0. A prompt with
    no ordered pair weighs nothing."""
    completions, targets, source = zip(*(rows[i] for i in indices))
    K = max(map(len, completions))
    present = torch.tensor([[k < len(c) for k in range(K)] for c in completions])  # (B, K)
    target = torch.tensor([[*t, *[0] * (K - len(t))] for t in targets])  # (B, K)
    weight = torch.tensor([float(len(t) == 1 or len(set(t)) > 1) for t in targets])
    lengths = [[*map(len, c), *[0] * (K - len(c))] for c in completions]
    batch = {"present": present, "target": target, "weight": weight, "source": list(source)}
    batch["n_completion"] = torch.tensor(lengths)  # (B, K)
    tokens, mask = pad([ids for c in completions for ids in c], pad_id)  # (N, T)
    for name, x, fill in (("tokens", tokens, pad_id), ("mask", mask, False)):
        batch[name] = torch.full((*present.shape, x.shape[1]), fill, dtype=x.dtype)  # (B, K, T)
        batch[name][present] = x
    return batch


def to_device(batch, device):
    """Its tensors on the device, but for lengths, "n_...", and weights, by which the CPU decides
    what to do. To a GPU they go while the CPU does something else."""
    pinned = lambda x: x.pin_memory() if device.type == "cuda" else x
    move = lambda x: pinned(x).to(device, non_blocking=True)
    stays = lambda name, x: not torch.is_tensor(x) or name == "weight" or name.startswith("n_")
    return {k: v if stays(k, v) else move(v) for k, v in batch.items()}


def batches(rows, batch_size, collate, pad_id):
    """All rows in order, for evaluation."""
    starts = range(0, len(rows), batch_size)
    return [collate(rows, range(s, min(s + batch_size, len(rows))), pad_id) for s in starts]
