"""Tokens, held against those of tiktoken, transformers and tokenizers, in and out."""

import json
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorlhf.bpe import train_bpe
from nanorlhf.data.dialogue import encode_document
from nanorlhf.hf.export import byte_symbols, tiktokens
from nanorlhf.hf.tokenizer import ForeignTokenizer
from nanorlhf.tokenizer import GPT2_PATTERN, PATTERN, Tokenizer, byte_tokenizer
from tests.helpers import refused
from tests.hf.folders import (
    BYTE_LEVEL,
    CHATML,
    CHATML_SPECIAL,
    TEMPLATES,
    byte_level,
    sentencepiece,
    tokenizers,
    transformers,
    with_thoughts,
    write,
)
from tests.hf.test_load import STORY
from tests.hf.test_template import read

CACHE = Path(__file__).parents[3] / "shared/data/tiktoken"
SOURCE = TEMPLATES["a default system text"][0]
NAMES = {"eos_token": "<|endoftext|>"}
words = st.sampled_from(["e\u0301", "'ll", "12345", "  ", "\r\n", "\n\n", "\x1c", "a", "é", "🦊"])
some_text = st.lists(words | st.text(max_size=6), max_size=8).map("".join)


ENGINES = {family: lambda f=family: byte_level(f, ["<|endoftext|>"]) for family in BYTE_LEVEL}
ENGINES |= {"nfc": lambda: byte_level("qwen2", ["<|endoftext|>"], nfc=True)}
ENGINES |= {"bytes that its text lacks": lambda: without_bytes(byte_level("gpt2"))}
ENGINES |= {"sentencepiece": lambda: sentencepiece(["<|endoftext|>"])}
ENGINES |= {"words of a field": lambda: with_thoughts(byte_level("qwen2", ["<|endoftext|>"]))}


def without_bytes(engine):
    content = json.loads(engine.to_str())
    kept = [t for t in content["model"]["vocab"] if len(t) > 1 or t > "a"]
    kept = content["model"]["vocab"] = {token: i for i, token in enumerate(kept)}
    content["model"]["merges"] = [
        (a, b) for a, b in content["model"]["merges"] if {a, b, a + b} <= kept.keys()
    ]
    engine = tokenizers.Tokenizer.from_str(json.dumps(content))
    engine.add_special_tokens(["<|endoftext|>"])
    return engine


@pytest.mark.parametrize("what", ENGINES)
def test_any_text_has_the_ids_of_transformers_and_comes_back_as_theirs(tmp_path, what):
    theirs = write(tmp_path, ENGINES[what](), **NAMES)
    ours = read(tmp_path)
    (tmp_path / "step").mkdir()
    ours.save(tmp_path / "step")
    again = ForeignTokenizer.load(tmp_path / "step")
    assert again == ours

    @settings(max_examples=150)
    @given(some_text)
    def check(text):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == again.encode(text) == ids
        with_pads = [*ids[:2], ours.pad_id, *ids[2:], ours.eos_id]
        wanted = theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids) == ours.decode(with_pads) == wanted

    check()
    ids = ours.encode("the red cat")
    assert "".join(map(ours.token_text, ids)).strip() == ours.decode(ids)
    assert ours.token_text(ours.eos_id) == "<|endoftext|>"


def test_added_tokens_that_are_not_special_are_words(tmp_path):
    write(tmp_path, with_thoughts(byte_level("qwen2", CHATML_SPECIAL)), SOURCE, **CHATML)
    ours = read(tmp_path)
    ids = ours.encode("an ACME <think> lamp")
    assert {ours.engine.token_to_id(t) for t in ("ACME", "<think>")} < set(ids)
    assert ours.decode(ids) == "an ACME <think> lamp"


def test_text_that_spells_a_special_token_or_an_alias_is_text(tmp_path):
    write(tmp_path, byte_level("qwen2", CHATML_SPECIAL), SOURCE, **CHATML)
    ours = read(tmp_path)
    for text in (*CHATML_SPECIAL, *ours.alias_of.values(), "\ud800", "a\U0010fffe1<\U0010ffffb"):
        ids = ours.encode(text)
        assert ids and not set(ids) & {*ours.special.values(), *ours.id_of}
        turns = [("user", text), ("assistant", text)]
        ends = [i for i in ours.dialogue(turns)[0] if i == ours.eos_id]
        assert len(ends) == 3  # of the default system text, too
    assert ours.decode(ours.encode("<|im_end|>")) == "<|im_end|>"
    assert ours.decode([ours.vocab_size + 5]) == ""  # a row of the embedding without a token


def test_ends_pad_and_start(tmp_path):
    """The pad is the model's own, unless that ends a text; the ends are all that its files name."""
    special, more = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ("<|vision_pad|>", "<unk>")
    cases = [
        (special, {"pad_token": "<|endoftext|>"}, None, "<|endoftext|>", [2]),
        (special, {"pad_token": "<|im_end|>"}, None, "<|endoftext|>", [2]),  # as SmolLM2
        ([*special, more[0]], {"pad_token": "<|endoftext|>"}, [2, 0], more[0], [2, 0]),
        ([*special, more[1]], {"unk_token": "<unk>"}, [2, 0], "<unk>", [2, 0]),
        (special, {"pad_token": "<|endoftext|>"}, [2, 0], "<|pad|>", [2, 0]),
    ]
    for i, (names, files, eos, pad, ends) in enumerate(cases):
        folder = tmp_path / str(i)
        write(folder, byte_level("qwen2", names), SOURCE, **{"eos_token": "<|im_end|>"} | files)
        if eos:
            (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        ours = read(folder)
        assert (ours.pad, list(ours.ends), ours.eos_id) == (pad, ends, 2), i
        assert ours.pad_id not in ours.ends
        assert ours.added == (["<|pad|>"] if pad == "<|pad|>" else [])
        assert encode_document(ours, "a") == [2, *ours.encode("a")]


def test_a_base_model_starts_a_text_as_its_own_tokenizer_does(tmp_path):
    engine = byte_level("llama3", ["<|begin_of_text|>", "<|end_of_text|>"])
    engine.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    theirs = write(tmp_path, engine, **names)
    assert encode_document(read(tmp_path), "a red cat") == theirs("a red cat")["input_ids"]
    assert read(tmp_path).ends == (1,)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": False}))
    assert encode_document(read(tmp_path), "a")[0] == 1  # the end of the document before


def test_rows_of_the_embedding_that_belong_to_no_token_take_new_ones(tmp_path):
    """As Qwen's: its vocabulary is smaller than its embedding."""
    write(tmp_path, byte_level("qwen2", ["<|endoftext|>"]), n_spare=9, **NAMES)
    ours, n_rows = read(tmp_path), json.loads((tmp_path / "config.json").read_text())["vocab_size"]
    assert ours.vocab_size == n_rows
    assert sorted(ours.special[name] for name in ours.added) == [n_rows - 9, n_rows - 8, n_rows - 7]


def test_what_cannot_be_read_is_one_line(tmp_path, capsys):
    write(tmp_path / "eos", byte_level("gpt2", ["<|pad|>"]), pad_token="<|pad|>")
    config = json.loads((tmp_path / "eos/config.json").read_text()) | {"eos_token_id": None}
    (tmp_path / "eos/config.json").write_text(json.dumps(config))
    (tmp_path / "eos/generation_config.json").unlink(missing_ok=True)
    assert "it names no end of a text" in refused(capsys, read, tmp_path / "eos")
    folder = tmp_path / "a"
    write(folder, byte_level("gpt2", CHATML_SPECIAL), SOURCE, **CHATML)
    files = {
        "tokenizer_config.json": (b"[1]", "no JSON object"),
        "special_tokens_map.json": (b"{", "no JSON object"),
        "generation_config.json": (b"\xff", "generation_config.json"),
        "tokenizer.json": (b'{"version": "1.0"}', "its tokenizer cannot be read"),
    }
    gaps = json.loads((folder / "tokenizer.json").read_text())
    gaps["model"]["vocab"]["é"] = 1000
    files |= {"tokenizer.json ": (json.dumps(gaps).encode(), "the ids of its tokens have gaps")}
    for name, (content, named) in files.items():
        name = name.strip()
        before = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).write_bytes(content)
        said = refused(capsys, read, folder)
        assert named in said and str(folder) in said
        (folder / name).write_bytes(before) if before else (folder / name).unlink()
    (folder / "tokenizer.json").unlink()
    assert "AutoTokenizer.from_pretrained" in refused(capsys, read, folder)


def test_another_template_or_vocabulary_is_another_tokenizer(tmp_path):
    """A reward model must read what the policy writes."""
    for name, source in (("a", SOURCE), ("b", SOURCE), ("c", SOURCE.replace("kind", "brief"))):
        write(tmp_path / name, byte_level("qwen2", CHATML_SPECIAL), source, **CHATML)
    write(tmp_path / "d", byte_level("qwen2", CHATML_SPECIAL, size=300), SOURCE, **CHATML)
    a, b, c, d = (read(tmp_path / name) for name in "abcd")
    assert a == b and a not in (c, d, byte_tokenizer()) and byte_tokenizer() != a


# ---- ours for the field ------------------------------------------------------------------------


def engine_of(tokenizer):
    return tokenizers.Tokenizer.from_str(tiktokens(tokenizer).decode())


@given(
    st.lists(st.text("ab ", min_size=1, max_size=30), min_size=1, max_size=20),
    st.integers(260, 330),
    st.lists(st.text("ab ", max_size=60), min_size=5, max_size=20),
)
def test_any_bpe_that_is_trained_here_is_exported_exactly(documents, size, texts):
    """Few letters make many tokens that are put together in several ways: the hard case."""
    ours = train_bpe(documents, size)
    theirs = engine_of(ours)
    for text in texts:
        assert ours.encode(text) == theirs.encode(text).ids


def test_the_exported_tokens_of_any_unicode_text_are_ours():
    ours = train_bpe([STORY, Path(__file__).read_text()], 400)
    theirs = engine_of(ours)
    assert {name: theirs.token_to_id(name) for name in ours.special} == ours.special

    @given(st.text() | st.text(STORY, max_size=60))
    @settings(max_examples=300)
    def check(text):
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == theirs.decode(ids) == text

    check()


def test_every_byte_has_a_symbol_of_its_own():
    symbols = byte_symbols()
    assert len(set(symbols.values())) == 256 and symbols[ord("a")] == "a" and symbols[32] == "Ġ"
    assert all(len(s) == 1 and s.isprintable() and not s.isspace() for s in symbols.values())


@pytest.mark.parametrize("pattern", [PATTERN, GPT2_PATTERN])
def test_bytes_and_gpt2s_pattern_are_exported_exactly(pattern):
    ours = Tokenizer(pattern, byte_tokenizer().ranks)
    assert ours.encode(STORY) == engine_of(ours).encode(STORY).ids


@pytest.mark.skipif(not CACHE.exists(), reason="needs shared/data/tiktoken")
def test_gpt2s_tokens_are_tiktokens_and_transformers(tmp_path, monkeypatch):
    """From the original files, which transformers turns into a tokenizer.json."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
    reference = tiktoken.get_encoding("gpt2")
    files = [p for p in CACHE.iterdir() if p.read_bytes()[:1] in (b"{", b"#")]
    vocabulary, merges = sorted(files, key=lambda p: p.read_bytes())[::-1]
    (tmp_path / "vocab.json").write_bytes(vocabulary.read_bytes())
    (tmp_path / "merges.txt").write_bytes(merges.read_bytes())
    config = {"model_type": "gpt2", "vocab_size": 50257, "eos_token_id": 50256}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path)
    ours = read(tmp_path)
    assert (ours.eos_id, ours.pad_id, ours.vocab_size) == (50256, 50257, 50260)
    assert (ours.special["<|user|>"], ours.special["<|assistant|>"]) == (50258, 50259)

    @given(st.text() | st.text("a 'sdtremlv\n1é🦊\u0300\u2028", max_size=40))
    @settings(max_examples=400)
    def check(text):
        if "<|endoftext|>" not in text:
            assert ours.encode(text) == reference.encode_ordinary(text) == theirs(text)["input_ids"]

    check()
