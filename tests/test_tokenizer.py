"""The tokenizer: any text round-trips, special ids come from code alone, BPE equals an oracle."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import regex
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from nanorlhf.bpe import train_bpe
from nanorlhf.tokenizer import (
    ASSISTANT,
    EOS,
    PAD,
    PATTERN,
    USER,
    Tokenizer,
    byte_tokenizer,
    gpt2_tokenizer,
)
from tests.helpers import refused

GPT2_FILES = Path(__file__).parents[2] / "shared/data/tiktoken"
TEXTS = [
    "The cat sat on the mat, the cat's mat.\n\nThe   end.",
    f"naïve café 12 345 日本語 🦊🦊 {USER}the{ASSISTANT} the{EOS}",
]
BPE, BYTES = train_bpe(TEXTS * 2, 300), byte_tokenizer()
SPECIALS = (EOS, PAD, USER, ASSISTANT)
small_texts = st.lists(st.text("aab é\n1.", max_size=24), max_size=5)


def special_ids(tokenizer):
    return tokenizer.eos_id, tokenizer.pad_id, tokenizer.user_id, tokenizer.assistant_id


@given(st.text())
def test_any_text_round_trips(text):
    for tokenizer in (BPE, BYTES):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size - 4 for i in ids)


@given(st.lists(st.sampled_from([*SPECIALS, "<|", "|>", "user", "pad", " ", "x"])))
def test_text_that_spells_a_special_token_gives_no_special_id(parts):
    text = "".join(parts)
    for tokenizer in (BPE, BYTES):
        assert not set(tokenizer.encode(text)) & set(special_ids(tokenizer))
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("tokenizer", [BPE, BYTES])
def test_special_ids_are_four_different_ones_behind_the_ordinary(tokenizer):
    n = tokenizer.vocab_size
    assert sorted(special_ids(tokenizer)) == list(range(n - 4, n))
    assert tokenizer.pad_id != tokenizer.eos_id


@given(st.text("ab é", max_size=20), st.integers(0, 20), st.integers(0, 3))
def test_decode_drops_special_ids(text, where, which):
    ids = BPE.encode(text)
    ids.insert(where, special_ids(BPE)[which])
    without = [i for i in ids if i not in special_ids(BPE)]
    assert BPE.decode(ids) == BPE.decode(without)
    assert BPE.decode(special_ids(BPE)) == ""


def test_decode_replaces_broken_utf8():
    assert BYTES.decode(list("é".encode())[:1] + [ord("x")]) == "\ufffdx"
    assert BYTES.decode([0xFF]) == "\ufffd"


def test_a_lone_surrogate_becomes_the_replacement_character():
    assert BPE.decode(BPE.encode("a\ud800b")) == "a\ufffdb"
    assert train_bpe(["a\ud800b"] * 3, 300).vocab_size <= 300


def naive_bpe(texts, vocab_size):
    """The slow oracle: every pair of every word is counted again before each merge."""
    words = [[bytes([b]) for b in w.encode()] for t in texts for w in regex.findall(PATTERN, t)]
    vocabulary = [bytes([b]) for b in range(256)]
    while len(vocabulary) + 4 < vocab_size:
        counts = Counter((w[i], w[i + 1]) for w in words for i in range(len(w) - 1))
        top = max(counts.values(), default=0)
        if top < 2:
            break
        left, right = min(pair for pair, n in counts.items() if n == top)
        vocabulary.append(left + right)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == (left, right):
                    word[i : i + 2] = [left + right]
                i += 1
    return {token: i for i, token in enumerate(vocabulary)}


@given(small_texts, st.integers(260, 285))
def test_train_bpe_equals_an_oracle_that_recounts_every_pair(texts, vocab_size):
    assert train_bpe(texts, vocab_size).ranks == naive_bpe(texts, vocab_size)


def test_train_bpe_equals_the_oracle_on_prose():
    assert train_bpe(TEXTS * 2, 400).ranks == naive_bpe(TEXTS * 2, 400)


def test_train_bpe_equals_the_oracle_on_words_of_two_letters_and_ids_leave_no_gap():
    rng = random.Random(1)
    text = " ".join("".join(rng.choices("ab", k=rng.randint(1, 7))) for _ in range(200))
    tokenizer = train_bpe([text], 330)
    assert tokenizer.ranks == naive_bpe([text], 330)
    assert sorted(tokenizer.ranks.values()) == list(range(tokenizer.vocab_size - 4))


@given(small_texts, st.integers(260, 300))
def test_vocab_size_is_never_exceeded_and_counts_bytes_and_specials(texts, vocab_size):
    tokenizer = train_bpe(texts, vocab_size)
    assert 260 <= tokenizer.vocab_size <= vocab_size
    assert tokenizer.vocab_size == len(tokenizer.ranks) + 4 == tokenizer.encoding.n_vocab


def test_vocab_size_is_reached_where_the_text_has_pairs_enough():
    for vocab_size in (260, 261, 270, 300):
        assert train_bpe(TEXTS * 9, vocab_size).vocab_size == vocab_size


@given(small_texts, st.randoms())
def test_a_vocabulary_depends_on_the_texts_and_not_on_their_order(texts, rng):
    shuffled = rng.sample(texts, len(texts))
    assert train_bpe(texts, 290) == train_bpe(texts, 290) == train_bpe(shuffled, 290)


def test_merges_stay_within_words_and_shorten_frequent_ones():
    tokenizer = train_bpe(["hello hello, hello world "] * 20, 290)
    assert len(tokenizer.encode(" hello")) == 1
    pieces = regex.findall(PATTERN, "hello hello, hello world ")
    assert all(any(t.decode() in p for p in pieces) for t in tokenizer.ranks if len(t) > 1)


@pytest.mark.parametrize("tokenizer", [BPE, BYTES])
def test_a_saved_tokenizer_loads_equal(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded == tokenizer
    assert special_ids(loaded) == special_ids(tokenizer)
    assert all(loaded.encode(text) == tokenizer.encode(text) for text in TEXTS)


def test_other_vocabularies_are_not_equal():
    assert BPE != BYTES
    assert BPE != train_bpe(TEXTS * 2, 299)
    assert BPE != Tokenizer(PATTERN + "|x", BPE.ranks)


@pytest.mark.skipif(not GPT2_FILES.exists(), reason="needs shared/data/tiktoken")
def test_gpt2_equals_tiktokens_own_ids(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(GPT2_FILES))
    tokenizer, own = gpt2_tokenizer(), tiktoken.get_encoding("gpt2")
    for text in (*TEXTS, "I'll say: don't!  \n\tOK\r\n", ""):
        assert tokenizer.encode(text) == own.encode_ordinary(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_id == own.eot_token == 50256
    assert tokenizer.vocab_size == 50260


def test_gpt2_out_of_reach_is_one_line_and_exit_2(monkeypatch, capsys):
    def unreachable(name):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    assert "TIKTOKEN_CACHE_DIR" in refused(capsys, gpt2_tokenizer)


def test_a_tokenizer_of_an_early_format_says_so(tmp_path):
    """It may have been another project's, with a template of its own."""
    BPE.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"style": "chatml"}))
    with pytest.raises(ValueError, match="early format"):
        Tokenizer.load(tmp_path)
