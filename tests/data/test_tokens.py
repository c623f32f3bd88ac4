"""Text as one long stream of tokens on disk, and windows of it."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train_gpt
from nanorlhf.bpe import train_bpe
from nanorlhf.config import die
from nanorlhf.data.batches import text_batch, write_tokens
from nanorlhf.tokenizer import Tokenizer, byte_tokenizer
from tests.helpers import refused

BYTES = byte_tokenizer()
EOS = BYTES.eos_id


def test_tokens_are_written_with_an_eos_before_and_behind_every_document(tmp_path):
    stream = write_tokens(iter(["hé", "", "x"]), BYTES, tmp_path / "a.bin")
    assert stream.tolist() == [EOS, *"hé".encode(), EOS, EOS, ord("x"), EOS]
    assert stream.dtype == np.uint16


@pytest.mark.parametrize("size, dtype", [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_a_large_vocabulary_is_written_whole(tmp_path, size, dtype):
    large = SimpleNamespace(vocab_size=size, eos_id=size - 1, encode=lambda text: [size - 2])
    stream = write_tokens(["x"], large, tmp_path / "a.bin")
    assert stream.dtype == dtype and stream.tolist() == [size - 1, size - 2, size - 1]


def test_a_token_file_that_cannot_be_written_is_one_line_and_status_2(tmp_path, capsys):
    missing = tmp_path / "missing/a.bin"
    assert "missing/a.bin" in refused(capsys, lambda: write_tokens(["x"], BYTES, missing))


def test_no_text_is_one_eos(tmp_path):
    stream = write_tokens([], BYTES, tmp_path / "a.bin")
    assert stream.tolist() == [EOS]


def test_tokens_per_byte_are_those_of_the_given_tokens_alone():
    tokenizer = train_bpe(["aaaa bbbb"] * 50, 270)
    for text in ("aaaa", "жж", "a"):
        ids = np.array([*tokenizer.encode(text), tokenizer.eos_id])
        assert tokenizer.tokens_per_byte(ids) == len(ids) / len(text.encode())
    assert tokenizer.tokens_per_byte(np.array([tokenizer.eos_id])) == 1  # no text: never 1 / 0


def test_held_out_bits_per_byte_go_by_the_bytes_of_the_targets(tmp_path):
    """Training text of one byte a token and held-out text of two: each batch has its own."""
    ranks = {bytes([i] * (1 + i // 128)): i for i in range(256)}
    tokenizer = SimpleNamespace(vocab_size=260, ranks=ranks)
    tokenizer.tokens_per_byte = partial(Tokenizer.tokens_per_byte, tokenizer)
    cfg = train_gpt.Config(block_size=8, batch_size=2)
    ids = np.array([EOS, *[200] * 30, *[100] * 100])
    batches = train_gpt.held_out_batches(cfg, ids, tokenizer)
    assert len(batches) == 4
    targets = np.concatenate([b["tokens"][:, 1:].flatten().numpy() for b in batches])
    assert len(targets) == 64 and (targets == 200).sum() == 30
    for batch in batches:
        assert torch.allclose(batch["tokens_per_byte"], torch.tensor(64 / (2 * 30 + 34)))


def test_text_that_cannot_be_read_leaves_the_tokens_of_the_run_before(tmp_path):
    def texts():
        yield "new"
        die("text.jsonl:2: not JSON")

    path, tokenizer = tmp_path / "train.bin", byte_tokenizer()
    write_tokens(["old"], tokenizer, path)
    before = path.read_bytes()
    with pytest.raises(SystemExit):
        write_tokens(texts(), tokenizer, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@given(st.integers(1, 20), st.integers(1, 30), st.integers(0, 9))
def test_windows_are_in_range_and_hold_each_token_with_the_next(length, spare, seed):
    stream = np.arange(1000, 1000 + length + spare, dtype=np.uint16)
    starts = np.random.default_rng(seed).integers(0, len(stream) - length, 7)
    batch = text_batch(stream, [*starts, 0, len(stream) - length - 1], length, "book")
    tokens = batch["tokens"]
    assert tokens.shape == (9, length + 1)
    assert (tokens[:, 1:] == tokens[:, :-1] + 1).all()  # targets are inputs shifted by one
    assert tokens[:, 0].tolist() == [1000 + s for s in (*starts, 0, len(stream) - length - 1)]
    assert tokens.max() == stream[-1]
    assert batch["weight"].tolist() == [float(length)] * 9
    assert batch["source"][7] == "book, token 0"
