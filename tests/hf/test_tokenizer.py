"""Tokens, held against those of tiktoken, transformers and tokenizers."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorlhf.hf.tokenizer import byte_symbols, read_tokenizer, tokenizer_files
from nanorlhf.loading import load_gpt
from nanorlhf.tokenizer import (
    GPT2_PATTERN,
    PATTERN,
    Tokenizer,
    byte_tokenizer,
    gpt2_tokenizer,
    train_bpe,
)
from tests.helpers import refused
from tests.hf import test_load
from tests.hf.test_load import STORY

transformers = pytest.importorskip("transformers")
folder, tokenizer = test_load.folder, test_load.tokenizer  # fixtures

CACHE = Path(__file__).parents[3] / "shared/data/tiktoken"
needs_gpt2 = pytest.mark.skipif(not CACHE.exists(), reason="needs shared/data/tiktoken")


@pytest.fixture(scope="module")
def gpt2_pair(tmp_path_factory):
    """(ours, tiktoken's, transformers') GPT-2 tokenizer, the last from the original files."""
    import tiktoken

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
        ours, reference = gpt2_tokenizer(), tiktoken.get_encoding("gpt2")
    folder = tmp_path_factory.mktemp("gpt2")
    vocabulary, merges = sorted(
        (p for p in CACHE.iterdir() if p.read_bytes()[:1] in (b"{", b"#")),
        key=lambda p: p.read_bytes(),
    )[::-1]
    shutil.copy(vocabulary, folder / "vocab.json")
    shutil.copy(merges, folder / "merges.txt")
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    return ours, reference, transformers.AutoTokenizer.from_pretrained(folder), folder


@needs_gpt2
def test_gpt2s_tokens_are_tiktokens_and_transformers(gpt2_pair):
    ours, reference, theirs, folder = gpt2_pair
    from_files = read_tokenizer(folder, 50257)
    assert from_files == ours and ours.eos_id == theirs.eos_token_id == 50256

    @given(st.text() | st.text("a 'sdtremlv\n1é🦊\u0300\u2028", max_size=40))
    @settings(max_examples=400)
    def check(text):
        if "<|endoftext|>" not in text:
            assert ours.encode(text) == reference.encode_ordinary(text) == theirs(text)["input_ids"]

    check()
    letters = "".join(
        map(chr, [*range(32, 0x2FFF), *range(0x1F000, 0x1FAFF), *range(0xA000, 0xABFF)])
    )
    for words in (letters, " ".join(letters), "a".join(letters)):
        assert ours.encode(words) == reference.encode_ordinary(words) == theirs(words)["input_ids"]


def hugging_face(tokenizer):
    from tokenizers import Tokenizer as Theirs

    return Theirs.from_str(json.dumps(tokenizer_files(tokenizer, 64, True)["tokenizer.json"]))


@given(
    st.lists(st.text("ab ", min_size=1, max_size=30), min_size=1, max_size=20),
    st.integers(260, 330),
    st.lists(st.text("ab ", max_size=60), min_size=5, max_size=20),
)
def test_any_bpe_that_is_trained_here_is_exported_exactly(documents, size, texts):
    """Few letters make many tokens that are put together in several ways: the hard case."""
    ours = train_bpe(documents, size)
    theirs = hugging_face(ours)
    for text in texts:
        assert ours.encode(text) == theirs.encode(text).ids


def test_the_exported_tokens_of_any_unicode_text_are_ours(tokenizer):
    theirs = hugging_face(tokenizer)

    @given(st.text() | st.text(STORY, max_size=60))
    @settings(max_examples=300)
    def check(text):
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False).ids

    check()


def test_a_tokenizer_that_ours_cannot_be_is_refused(folder, capsys):
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text())
    token = whole["added_tokens"][0]
    moved = [{**token, "content": "[PAD]"}, {**token, "id": token["id"] + 1}]
    vocab = whole["model"]["vocab"]
    gap = vocab | {max(vocab, key=vocab.get): max(vocab.values()) + 5}
    for change, named in (
        ({"model": whole["model"] | {"vocab": gap}}, "gaps"),
        ({"added_tokens": moved}, "<|endoftext|> has id"),
        ({"normalizer": {"type": "Lowercase"}}, "changes the text"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
        ({"model": whole["model"] | {"merges": whole["model"]["merges"][::-1]}}, "order"),
        ({"model": {"type": "WordPiece"}}, "WordPiece"),
    ):
        path.write_text(json.dumps(whole | change))
        assert named in refused(capsys, load_gpt, folder)


def test_special_tokens_that_are_not_ours_are_left_out_with_a_word(folder, capsys):
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text())
    token = whole["added_tokens"][0]
    more = {**token, "id": token["id"] + 1, "content": "[PAD]"}
    path.write_text(json.dumps(whole | {"added_tokens": [token, more]}))
    _, found = load_gpt(folder)
    assert "[PAD]" in capsys.readouterr().err and found.tokenizer.vocab_size == token["id"] + 4


def test_every_byte_has_a_symbol_of_its_own():
    symbols = byte_symbols()
    assert len(set(symbols.values())) == 256 and symbols[ord("a")] == "a" and symbols[32] == "Ġ"
    assert all(len(s) == 1 and s.isprintable() and not s.isspace() for s in symbols.values())


def test_bytes_and_gpt2_patterns_survive_the_round_trip(tmp_path):
    for pattern in (PATTERN, GPT2_PATTERN):
        tokenizer = Tokenizer(pattern, byte_tokenizer().ranks)
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(tokenizer_files(tokenizer, 9, True)["tokenizer.json"]))
        assert read_tokenizer(tmp_path, 260) == tokenizer
