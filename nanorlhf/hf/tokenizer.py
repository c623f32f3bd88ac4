"""Tokenizers in Hugging Face layout, in and out: tokenizer.json, or vocab.json and merges.txt.

Of the adjacent pairs in a word, tiktoken first merges the one whose union has the lowest id;
Hugging Face first merges the one that comes first in the file's list of merges. The two agree where
that list is in the order of the unions' ids, and holds every pair of tokens whose union is a token.
"""

import json

from nanorlhf.config import die, reason, warn
from nanorlhf.tokenizer import (
    ASSISTANT,
    EOS,
    GPT2_PATTERN,
    PAD,
    SPECIAL,
    USER,
    Tokenizer,
    gpt2_tokenizer,
)

CHAT_TEMPLATE = """
{%- set ns = namespace(system="") -%}
{%- for message in messages -%}
  {%- if message["role"] == "system" -%}
    {%- if message["content"] -%}
      {%- set ns.system = ns.system + message["content"] + "\\n\\n" -%}
    {%- endif -%}
  {%- elif message["role"] == "user" -%}
    {{- "<|user|>" + ns.system + message["content"] -}}
    {%- set ns.system = "" -%}
  {%- elif message["role"] == "assistant" -%}
    {{- "<|assistant|>" + message["content"] + "<|endoftext|>" -}}
  {%- else -%}
    {{- raise_exception("roles are system, user and assistant") -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|assistant|>" -}}{%- endif -%}
"""


def byte_symbols():
    """{byte: the visible character that stands for it in GPT-2's files}."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


# ---- in ----------------------------------------------------------------------------------------


def read_tokenizer(folder, vocab_size):
    """The Tokenizer of a folder's files, which must be a byte-level BPE. Without files it is
    GPT-2's own, if `vocab_size` is GPT-2's."""
    try:
        if (folder / "tokenizer.json").exists():
            vocab, merges, pattern, added = _read_tokenizer_json(folder / "tokenizer.json")
        elif (folder / "vocab.json").exists():
            vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            merges = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
            merges = [tuple(m.split(" ")) for m in merges if m and not m.startswith("#version")]
            pattern, added = GPT2_PATTERN, {}
        elif vocab_size == 50257:
            return gpt2_tokenizer()
        else:
            die(f"{folder}: no tokenizer.json and no vocab.json in it")
        return _tokenizer(vocab, merges, pattern, added)
    except Exception as error:  # a damaged file can fail in any of these steps, and in many ways
        die(f"{folder}: its tokenizer cannot be read as a byte-level BPE: {reason(error)}")


def _read_tokenizer_json(path):
    """(vocabulary, merges, pattern, added tokens)."""
    content = json.loads(path.read_text(encoding="utf-8"))
    pre = content["pre_tokenizer"]
    steps = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        pattern = GPT2_PATTERN
    elif kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        pattern = steps[0]["pattern"]["Regex"]
    else:
        raise ValueError(f"pre-tokenizers {kinds}")
    if content.get("normalizer") or steps[-1].get("add_prefix_space"):
        raise ValueError("it changes the text before it splits it")
    added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in content["model"]["merges"]]
    return content["model"]["vocab"], merges, pattern, added


def _tokenizer(vocab, merges, pattern, added):
    """A Tokenizer of the plain tokens, with our special ones behind them. ValueError where it could
    not encode as theirs does; of their other special tokens the user is told."""
    byte_of = {symbol: b for b, symbol in byte_symbols().items()}

    def as_bytes(token):
        return bytes(byte_of[symbol] for symbol in token)

    plain = {token: i for token, i in vocab.items() if token not in added and token not in SPECIAL}
    ranks = {as_bytes(token): i for token, i in plain.items()}
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError("its ids have gaps")
    unions = [ranks[as_bytes(a) + as_bytes(b)] for a, b in merges]
    if unions != sorted(unions) or len(set(unions)) + 256 != len(ranks):
        raise ValueError("its merges are not in the order of its ids")
    tokenizer = Tokenizer(pattern, ranks)
    ours = {token: len(ranks) + i for i, token in enumerate(SPECIAL)}
    theirs = {token: vocab[token] for token in SPECIAL if token in vocab} | added
    if theirs.get(EOS, tokenizer.eos_id) != tokenizer.eos_id:
        raise ValueError(f"{EOS} has id {theirs[EOS]}, not the first behind the others")
    if lost := [token for token, i in theirs.items() if ours.get(token) != i]:
        warn(f"special tokens {', '.join(lost)} are not ours and are left out")
    return tokenizer


# ---- out ---------------------------------------------------------------------------------------


def tokenizer_files(tokenizer, block_size, chat, padding_side="left"):
    """{file name: its content, for JSON}: with these files AutoTokenizer encodes as `tokenizer`. A
    text that is too long loses its left. Generation needs pads on the left; a score is read at the
    right place only where they are on the right, as transformers' GPT-2 counts positions from the
    first pad."""
    symbols = byte_symbols()
    text_of = {token: "".join(symbols[b] for b in token) for token in tokenizer.ranks}
    ordered = sorted(tokenizer.ranks, key=tokenizer.ranks.get)
    merges = [  # every pair whose union is a token, see the top of this file
        [text_of[t[:i]], text_of[t[i:]]]
        for t in ordered
        for i in range(1, len(t))
        if t[:i] in text_of and t[i:] in text_of
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": tokenizer.pattern == GPT2_PATTERN,
    }
    split = {
        "type": "Split",
        "pattern": {"Regex": tokenizer.pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    split_first = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    special = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    n_plain = len(ordered)
    main = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": None,
        "added_tokens": [
            {"id": n_plain + i, "content": t} | special for i, t in enumerate(SPECIAL)
        ],
        "pre_tokenizer": byte_level if byte_level["use_regex"] else split_first,
        "post_processor": None,
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {text_of[t]: i for i, t in enumerate(ordered)},
            "merges": merges,
        },
    }
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "bos_token": EOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "padding_side": padding_side,
        "truncation_side": "left",
        "additional_special_tokens": [USER, ASSISTANT],
        "clean_up_tokenization_spaces": False,
    }
    about |= {"chat_template": CHAT_TEMPLATE.strip()} if chat else {}
    return {"tokenizer.json": main, "tokenizer_config.json": about}
