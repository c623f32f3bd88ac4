"""Documents -> one long stream of token ids in a file -> windows of it.

Shapes: B windows, T positions.
"""

import numpy as np
import torch

from nanorlhf.machine import durable
from nanorlhf.machine.ranks import on_main


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
        on_main(lambda: durable.write(path, fill))
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
