"""Rows of token ids, or one long stream of them -> batches of tensors -> the micro-batches of this
process.

A batch is a dict of tensors whose first dimension is B. Its "source" is a list that says where
each example came from, for error messages. Its "weight" (B,) says what each example counts for in
a mean: the number of its loss tokens, or 1.

Shapes: B examples, K completions of one prompt, T positions, N completions of all the prompts of a
batch, S positions once pads stand behind everything else.
"""

from itertools import chain

import numpy as np
import torch

from nanorlhf.machine import durable, ranks


def pad(rows, pad_id, left=False):
    """Lists of ids -> tokens (B, T) and a bool mask (B, T), which is False on pads. Pads stand on
    the right; or on the left, with T a multiple of 8 (why: see GPT.blocks)."""
    T = max(map(len, rows))
    T += -T % 8 if left else 0
    lengths, places = torch.tensor([[len(row)] for row in rows]), torch.arange(T)
    mask = places >= T - lengths if left else places < lengths  # (B, T)
    tokens = torch.full(mask.shape, pad_id)
    tokens[mask] = torch.tensor(list(chain(*rows)), dtype=torch.long)
    return tokens, mask


def split(batch, n):
    """Cut a batch into at most n parts of equally many rows; the last part may have fewer."""
    size = -(-len(batch["weight"]) // n)
    for i in range(0, len(batch["weight"]), size):
        yield {name: x[i : i + size] for name, x in batch.items()}


def micro_batches(batch, cfg):
    """This process's micro-batches of a global batch, each in one or two groups, see `grouped`."""
    parts = ranks.mine(split(batch, cfg.grad_accum * ranks.world_size()))
    return [group for part in parts for group in grouped(part, cfg)]


def grouped(batch, cfg):
    """A batch that knows its lengths, as two groups of similar length where that saves work. With
    --shard it stays one: all processes must do equally many forward passes."""
    if "n_tokens" not in batch:
        return [batch]
    return [group for _, group in by_length(batch, 1 if cfg.shard else 2)]


def by_length(batch, n, always=False):
    """Sort the rows of a batch by length into n groups, each cut to its longest row. That saves
    most of the padding. Where it would save less than a tenth, there is one group, unless `always`.

    Yields (indices of the rows, group); a group holds the batch's tensors, not its lists. Tensors
    as wide as "tokens" are cut by "n_tokens" (B,), those as wide as the responses by "n_response"
    (B,); there is no other width by which one could be cut.
    """
    tensors = {name: x for name, x in batch.items() if torch.is_tensor(x)}
    widths = [tensors[name].shape[1] for name in ("tokens", "response_mask") if name in tensors]
    lengths = tensors["n_tokens"]
    order = lengths.argsort()
    groups = order.tensor_split(min(n, len(lengths)))
    cost = sum(len(index) * int(lengths[index[-1]]) for index in groups)  # positions, with pads
    if not always and cost > 0.9 * (len(lengths) * int(lengths.max())):
        groups = [order]
    for index in groups:
        group = {name: x[index] for name, x in tensors.items()}
        for name, x in group.items():
            if x.dim() > 1:
                assert x.shape[1] in widths, f"{name} is {x.shape[1]} wide, and not one of {widths}"
                n_positions = group["n_tokens" if x.shape[1] == widths[0] else "n_response"]
                longest = int(n_positions.max())
                group[name] = x[:, : longest + -longest % 8]  # a multiple of 8, see GPT.blocks
        yield index, group


def pads_last(tokens, real):
    """Move pads, where real (B, T) is False, to the end of each row; the other tokens keep their
    order. Cut to the longest row: (B, S)."""
    order = (~real).long().argsort(dim=1, stable=True)
    return tokens.gather(1, order)[:, : int(real.sum(1).max())]


def epoch_batch(n, batch_size, seed, step):
    """Indices of the examples of one step, out of n. Every epoch is a new permutation, and its last
    batch has what is left. They depend on nothing but the arguments, so a resumed run needs no
    state to go on with the same batches.

    Batches of examples of one length would save padding. But where most answers are one of a few
    texts, the length gives the answer away, and such a batch holds one answer many times.
    """
    epoch, i = divmod(step, -(-n // batch_size))
    return permutation(n, seed, epoch)[i * batch_size : (i + 1) * batch_size]


def full_batch(n, batch_size, seed, step):
    """As `epoch_batch`, but always batch_size indices: an epoch runs on into the next."""
    epoch, start = divmod(step * batch_size, n)
    n_epochs = -(-(start + batch_size) // n)
    orders = [permutation(n, seed, epoch + i) for i in range(n_epochs)]
    return np.concatenate(orders)[start : start + batch_size]


def permutation(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)


def drawn(items, n, seed):
    """At most n of the items, in their order, drawn from all of them: a file may be sorted."""
    return [items[i] for i in sorted(permutation(len(items), seed, 0)[:n])]


def write_tokens(texts, tokenizer, path):
    """Encode documents into a file of uint16, or uint32 for a large vocabulary, with an eos before
    the first document and after each. Returns a memmap of the file. One document is in memory at a
    time, so the corpus may be larger than memory."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32

    def fill(partial):
        with open(partial, "wb") as file:
            file.write(np.array([tokenizer.eos_id], dtype).tobytes())
            for text in texts:
                ids = [*tokenizer.encode(text), tokenizer.eos_id]
                file.write(np.array(ids, dtype).tobytes())

    with durable.or_exit(path):
        ranks.on_main(lambda: durable.write(path, fill))
    return np.memmap(path, dtype, mode="r")


def text_batch(stream, starts, length, source, tokens_per_byte=1.0):
    """A batch of windows of a token stream. Each has T = length inputs and one token more, the
    target of the last input. `source` names the stream in error messages, and `tokens_per_byte`
    turns its loss into bits per byte."""
    windows = np.stack([stream[s : s + length + 1] for s in starts]).astype(np.int64)
    return {
        "tokens": torch.from_numpy(windows),  # (B, T + 1)
        "weight": torch.full((len(starts),), float(length)),
        "tokens_per_byte": torch.full((len(starts),), tokens_per_byte),
        "source": [f"{source}, token {s}" for s in starts],
    }


def dialogue_batch(rows, indices, pad_id):
    """SFT: rows of `encode_demonstrations` -> "tokens" (B, T), "n_tokens" (B,), the length of each
    row, and "mask" (B, T), True on tokens to be learned."""
    ids, is_loss, sources = zip(*(rows[i] for i in indices))
    mask = pad(is_loss, 0)[0].bool()
    return {
        "tokens": pad(ids, pad_id)[0],
        "n_tokens": torch.tensor([len(row) for row in ids]),
        "mask": mask,
        "weight": mask[:, 1:].sum(1).float(),  # nothing predicts the first token
        "source": list(sources),
    }


def feedback_batch(rows, indices, pad_id):
    """RM: rows of `encode_feedback` -> "tokens" and "mask" (B, K, T), and all (B, K): "present",
    "target", "n_completion", the tokens of each completion with its prompt, and "n_answer", those
    of its last turn, with the eos.

    K is the most completions that a prompt has. Where one has fewer, `present` is False, and the
    numbers are 0. A prompt whose completions are all tied weighs 0: there is no pair to learn from.
    """
    completions, answers, targets, sources = zip(*(rows[i] for i in indices))
    K = max(map(len, completions))
    texts = [ids for c in completions for ids in [*c, *[[]] * (K - len(c))]]  # absent: no ids
    tokens, mask = (x.unflatten(0, (-1, K)) for x in pad(texts, pad_id))  # (B, K, T)
    filled = lambda lists: torch.tensor([[*x, *[0] * (K - len(x))] for x in lists])  # (B, K)
    return {
        "tokens": tokens,
        "mask": mask,
        "present": mask.any(2),  # (B, K)
        "n_completion": mask.sum(2),
        "n_answer": filled(answers),
        "target": filled(targets),
        "weight": torch.tensor([float(len(t) == 1 or len(set(t)) > 1) for t in targets]),
        "source": list(sources),
    }


def to_device(batch, device):
    """The batch with its tensors on the device. Lengths ("n_...") and weights stay on the CPU,
    which decides by them what to compute."""
    moved = dict(batch)
    for name, x in batch.items():
        if torch.is_tensor(x) and name != "weight" and not name.startswith("n_"):
            # out of pinned memory a GPU copies while the CPU goes on
            x = x.pin_memory() if device.type == "cuda" else x
            moved[name] = x.to(device, non_blocking=True)
    return moved


def batches(rows, batch_size, collate, pad_id):
    """All rows once, in order, for evaluation. `collate`: dialogue_batch or feedback_batch."""
    starts = range(0, len(rows), batch_size)
    return [collate(rows, range(s, min(s + batch_size, len(rows))), pad_id) for s in starts]
