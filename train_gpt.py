"""Stage 1: pretrain a GPT on raw text with the next-token loss.

    python train_gpt.py                          # the embedded world
    python train_gpt.py --data book.txt more.jsonl.gz --max_steps 2000
    python train_gpt.py --data book.txt --init gpt2 --learning_rate 5e-5

Departures from GPT-2 (Radford et al. 2019): a vocabulary trained on the text at hand, windows that
start with a document where documents are short, short windows mixed in, the exact GELU, no
dropout by default, initial weights scaled to the width, bfloat16 where it is fast.

Shapes: B windows, T positions.
"""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from nanorlhf import llama
from nanorlhf.config import TrainConfig, arg, die, from_cli, note
from nanorlhf.data.batches import text_batch
from nanorlhf.engine import claim, leave, train, unsharded
from nanorlhf.fused import head_loss
from nanorlhf.loading import load_gpt
from nanorlhf.model import GPTConfig
from nanorlhf.sampling import sample_responses
from nanorlhf.sources import make_tokenizer, texts_of, token_streams


@dataclass
class Config(TrainConfig):
    """Stage 1: pretrain a GPT on text. Without --data: the embedded world's text."""

    IDLE = (
        "tokenizer vocab_size arch n_layer n_head d_model: init; vocab_size: tokenizer=gpt2; "
        "vocab_size: tokenizer=bytes; documents: data; template: init=0"
    )
    out_dir: str = arg("out/gpt", "folder for this stage's checkpoints, metrics and samples")
    data: list[str] = arg([], "files (.txt .jsonl .csv ...) or hf:owner/name; default: the world's")
    val_data: list[str] = arg([], "held-out text; default: a tenth of the documents of --data")
    init: str = arg("", "go on from a checkpoint, gpt2, or a folder: its sizes, its vocabulary")
    documents: int = arg(8000, "documents that the embedded world writes")
    tokenizer: str = arg("bpe", "vocabulary", choices=("bpe", "gpt2", "bytes"))
    vocab_size: int = arg(768, "size of the BPE trained on the text, special tokens included")
    arch: str = arg("gpt2", "architecture: model.py's or llama.py's", choices=("gpt2", "llama"))
    n_layer: int = arg(2, "blocks")
    n_head: int = arg(4, "attention heads")
    d_model: int = arg(160, "width")
    block_size: int = arg(352, "context length in tokens", low=8)
    short_steps: float = arg(0.7, "share of steps with windows of a quarter of the length", high=1)
    dropout: float = arg(0.0, "dropout probability", high=1)
    max_steps: int = arg(420, "optimizer steps")
    batch_size: int = arg(12, "windows of block_size tokens per optimizer step")
    learning_rate: float = arg(6e-3, "peak learning rate")
    eval_every: int = arg(140, "steps between evaluations on held-out data")
    save_every: int = arg(140, "steps between checkpoints")
    sample_tokens: int = arg(80, "length of the samples printed at the end")


def main(cfg, on_row=None):
    claim(cfg)
    each = cfg.n_head * (2 if cfg.arch == "llama" else 1)  # a Llama turns pairs of dimensions
    if cfg.d_model % each:
        die(f"--d_model {cfg.d_model} must be a multiple of {each}, for --n_head {cfg.n_head}")
    if cfg.max_seq_len:
        die(f"--max_seq_len {cfg.max_seq_len}: text has no dialogues; --block_size cuts it")
    texts = texts_of(cfg)
    if cfg.init:
        gpt, init = load_gpt(cfg.init, cfg.dropout, cfg.template)
        tokenizer, model_config = init.tokenizer, init.model_config
        if cfg.block_size > model_config.block_size:
            context = model_config.block_size
            die(f"--block_size {cfg.block_size}: {cfg.init} has a context of {context}")
    else:
        tokenizer = make_tokenizer(cfg, texts)
        sizes = (cfg.block_size, cfg.n_layer, cfg.n_head, cfg.d_model, cfg.dropout)
        sized = llama.sized if cfg.arch == "llama" else partial(GPTConfig, gelu="none")
        model_config = sized(tokenizer.vocab_size, *sizes)
    train_ids, val_ids = token_streams(cfg, tokenizer, texts)
    n_per_byte = tokenizer.tokens_per_byte(train_ids[:10_000_000])
    document_starts = np.flatnonzero(train_ids == tokenizer.eos_id)
    torch.manual_seed(cfg.seed)
    if not cfg.init:
        gpt = model_config.build()

    def next_batch(step):
        # some steps take short windows, four times as many: copying words from the context, the
        # skill that takes longest to appear, appears sooner where there is less to look through
        is_short = int((step + 1) * cfg.short_steps) > int(step * cfg.short_steps)
        shrink = 4 if is_short else 1
        length = cfg.block_size // shrink
        rng = np.random.default_rng([cfg.seed, step])
        starts = rng.integers(0, len(train_ids) - length, cfg.batch_size * shrink)
        starts = whole_documents(starts, document_starts, length)
        return text_batch(train_ids, starts, length, "training text", n_per_byte)

    val_batches = held_out_batches(cfg, val_ids, tokenizer)
    base = {"chat": False}  # it has not learned the chat template
    what = "gpt", cfg, gpt, text_loss, next_batch, val_batches, tokenizer, cfg.max_steps
    result = train(*what, details=base, on_row=on_row)
    print_samples(unsharded(gpt, cfg), tokenizer, cfg)
    leave()
    return result


def text_loss(model, rows):
    """The next-token loss at every position of rows["tokens"] (B, T + 1): (loss, metrics)."""
    inputs, targets = rows["tokens"][:, :-1], rows["tokens"][:, 1:]  # (B, T)
    loss = head_loss(model.hidden(inputs), model.head_weight, targets)
    return loss, {"bits_per_byte": loss.detach() / math.log(2) * rows["tokens_per_byte"][0]}


def whole_documents(starts, document_starts, length):
    """Move a window back to where its document starts, if that is less than a window away: short
    documents are read from their beginning, as they will be when the model is prompted."""
    before = document_starts[np.searchsorted(document_starts, starts, side="right") - 1]
    return np.where((before <= starts) & (starts - before < length), before, starts)


def held_out_batches(cfg, val_ids, tokenizer):
    """Windows from the start of the held-out text, side by side: at most four batches of them."""
    length = min(cfg.block_size, len(val_ids) - 1)
    starts = range(0, len(val_ids) - length, length)[: 4 * cfg.batch_size]
    n_per_byte = tokenizer.tokens_per_byte(val_ids[1 : starts[-1] + length + 1])  # of the targets
    return [
        text_batch(val_ids, starts[i : i + cfg.batch_size], length, "held-out text", n_per_byte)
        for i in range(0, len(starts), cfg.batch_size)
    ]


def print_samples(gpt, tokenizer, cfg):
    """Three documents, each begun from an eos alone."""
    prompts = [[tokenizer.eos_id]] * 3
    max_new_tokens = min(cfg.sample_tokens, cfg.block_size - 1)
    note("[gpt] what the trained model writes, each from nothing:")
    for ids in sample_responses(gpt.eval(), tokenizer, prompts, max_new_tokens, cfg.seed):
        note("  sample | " + tokenizer.decode(ids).replace("\n", "\n         | "))


if __name__ == "__main__":
    main(from_cli(Config))
