"""Examples -> token ids -> batches.

Shapes: B examples, K completions of one prompt, T positions. A batch is a dict of tensors whose
first dimension is B, plus "source", where each example came from, for error messages. "weight"
(B,) is what an example counts for in a mean: its loss tokens, or 1.

The chat template, used by every stage after pretraining and defined here only:
<|user|>prompt<|assistant|>completion<|endoftext|>, repeated for several turns.
"""

from dataclasses import dataclass

import numpy as np
import torch

from nanorlhf.config import die, warn
from nanorlhf.data import is_held_out
from nanorlhf.parallel import on_main


def split_held_out(examples, val_examples, limit=None):
    """(training, validation) by `is_held_out`, or as given; neither may be empty. Of a large
    data set the first `limit` held-out examples are enough to see where training stands."""
    if not val_examples:
        val_examples = [e for e in examples if is_held_out(e.first_turn)]
        examples = [e for e in examples if not is_held_out(e.first_turn)]
    if not examples or not val_examples:
        die(
            f"{len(examples)} examples to train on and {len(val_examples)} held out (one prompt in "
            "ten, by its hash): give more data, or --val_data"
        )
    return examples, val_examples[:limit]


def encode_prompt(tokenizer, messages):
    """Ids of a dialogue up to where the assistant speaks next."""
    return encode_dialogue(tokenizer, messages)[0] + [tokenizer.assistant_id]


def encode_dialogue(tokenizer, messages):
    """(ids, is_loss): the template, and True on the assistant's words and their eos."""
    ids, is_loss = [], []
    for role, content in messages:
        words = tokenizer.encode(content)
        if role == "user":
            ids += [tokenizer.user_id, *words]
            is_loss += [False] * (1 + len(words))
        else:
            ids += [tokenizer.assistant_id, *words, tokenizer.eos_id]
            is_loss += [False] + [True] * (len(words) + 1)
    return ids, is_loss


def encode_demonstrations(tokenizer, examples, block_size):
    """SFT examples -> rows of (ids, is_loss, source) that fit block_size."""
    encoded = [encode_dialogue(tokenizer, e.messages) for e in examples]
    last = [len(tokenizer.encode(e.messages[-1][1])) + 1 for e in examples]
    ids, kept = fit([ids for ids, _ in encoded], last, block_size, "dialogues")
    return [(r, encoded[i][1][-block_size:], examples[i].source) for r, i in zip(ids, kept)]


def encode_feedback(tokenizer, examples, block_size):
    """Feedback -> rows of ([ids per completion], target, source); all of one fit, or none."""
    flat = [(i, e.messages, c) for i, e in enumerate(examples) for c in e.completions]
    rows = [encode_pair(tokenizer, messages, c) for _, messages, c in flat]
    n_response = [len(tokenizer.encode(c)) + 1 for *_, c in flat]
    found = {}  # index of an example -> its completions that fit
    for row, k in zip(*fit(rows, n_response, block_size, "completions")):
        found.setdefault(flat[k][0], []).append(row)
    whole = [(rows, examples[i]) for i, rows in found.items()]
    kept = [(rows, e.target, e.source) for rows, e in whole if len(rows) == len(e.completions)]
    return kept or die(f"no prompt has all its completions within {block_size} tokens")


@dataclass
class Prompt:
    """A prompt ready for PPO."""

    ids: list
    text: str  # what a reward function sees
    source: str


def encode_prompts(tokenizer, examples, room):
    """PPO examples -> Prompts of at most `room` tokens, cut from the left."""
    ids = [encode_prompt(tokenizer, e.messages) for e in examples]
    ids, _ = fit(ids, [0] * len(ids), room, "prompts")
    texts = ["\n".join(content for _, content in e.messages) for e in examples]
    return [Prompt(row, text, e.source) for row, text, e in zip(ids, texts, examples)]


def encode_pair(tokenizer, messages, completion):
    """Ids of a prompt with one completion and its eos, what the reward model reads."""
    return encode_dialogue(tokenizer, messages + [("assistant", completion)])[0]


def fit(rows, n_response, block_size, what):
    """Cut rows of ids from the left to block_size; the last n_response[i] ids are sacred. Returns
    (rows, kept): kept are the indices of rows whose response fits with one prompt token."""
    kept = [i for i, n in enumerate(n_response) if n < block_size]
    cut = sum(len(rows[i]) > block_size for i in kept)
    if cut:
        warn(f"{cut} of {len(rows)} {what} exceed {block_size} tokens: prompts cut from the left")
    if dropped := len(rows) - len(kept):
        warn(f"{dropped} of {len(rows)} {what} dropped: the response alone is too long")
    if not kept:
        die(f"no {what} fits into {block_size} tokens")
    return [rows[i][-block_size:] for i in kept], kept


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


def by_length(batch, n, always=False):
    """The tensors of a batch as n groups of rows of about one length, which saves most of the
    padding; yields (indices of the rows, group). One group, if not `always` n, where that would
    save less than a tenth. "n_tokens" (B,) cuts what is as wide as "tokens", "n_response" (B,)
    what is narrower."""
    tensors = {k: v for k, v in batch.items() if torch.is_tensor(v)}
    rounded = lambda lengths: -(-int(lengths.max()) // 8) * 8  # see GPT.blocks
    order, lengths = tensors["n_tokens"].argsort(), tensors["n_tokens"]
    split = order.tensor_split(min(n, len(order)))
    cost = lambda groups: sum(len(i) * int(lengths[i[-1]]) for i in groups)
    if not always and cost(split) > 0.9 * cost([order]):
        split = [order]
    for index in split:
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
    """RM: rows of ([ids per completion], target, source) -> tokens, mask (B, K, T), present and
    target (B, K). Absent completions have rank 0. A prompt with no ordered pair weighs nothing."""
    completions, targets, source = zip(*(rows[i] for i in indices))
    K = max(map(len, completions))
    present = torch.tensor([[k < len(c) for k in range(K)] for c in completions])  # (B, K)
    target = torch.tensor([[*t, *[0] * (K - len(t))] for t in targets])  # (B, K)
    weight = torch.tensor([float(len(t) == 1 or len(set(t)) > 1) for t in targets])
    batch = {"present": present, "target": target, "weight": weight, "source": list(source)}
    tokens, mask = pad([ids for c in completions for ids in c], pad_id)  # (N, T)
    for name, x, fill in (("tokens", tokens, pad_id), ("mask", mask, False)):
        batch[name] = torch.full((*present.shape, x.shape[1]), fill, dtype=x.dtype)  # (B, K, T)
        batch[name][present] = x
    return batch


def to_device(batch, device):
    """Its tensors on the device, but for lengths, "n_...", by which the CPU decides what to do.
    To a GPU they go while the CPU does something else."""
    pinned = lambda x: x.pin_memory() if device.type == "cuda" else x
    move = lambda x: pinned(x).to(device, non_blocking=True)
    stays = lambda name, x: not torch.is_tensor(x) or name.startswith("n_")
    return {k: v if stays(k, v) else move(v) for k, v in batch.items()}


def batches(rows, batch_size, collate, pad_id):
    """All rows in order, for evaluation."""
    starts = range(0, len(rows), batch_size)
    return [collate(rows, range(s, min(s + batch_size, len(rows))), pad_id) for s in starts]


def write_tokens(texts, tokenizer, path):
    """Encode documents, an eos before and after each, into a uint16 (or uint32) file; returns a
    memmap and the number of UTF-8 bytes. The corpus is never in memory as a whole."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32

    def write():
        n_bytes = 0
        try:
            with open(path, "wb") as file:
                file.write(np.array([tokenizer.eos_id], dtype).tobytes())
                for text in texts:
                    ids = [*tokenizer.encode(text), tokenizer.eos_id]
                    file.write(np.array(ids, dtype).tobytes())
                    n_bytes += len(text.encode("utf-8", errors="replace"))
        except OSError as error:
            die(f"{path}: {error.strerror}")
        return n_bytes

    n_bytes = on_main(write)
    return np.memmap(path, dtype, mode="r"), n_bytes


def text_batch(stream, starts, length, source):
    """Windows of length + 1 tokens from a token stream, at the given starts."""
    windows = np.stack([stream[s : s + length + 1] for s in starts]).astype(np.int64)
    return {
        "tokens": torch.from_numpy(windows),  # (B, T + 1)
        "weight": torch.full((len(starts),), float(length)),
        "source": [f"{source}, token {s}" for s in starts],
    }
