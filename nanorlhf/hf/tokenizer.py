"""Tokenizers in Hugging Face layout, in and out: tokenizer.json, or vocab.json and merges.txt.

Of the adjacent pairs in a word, tiktoken first merges the one whose union has the lowest id;
Hugging Face first merges the one that comes first in the file's list of merges. The two agree where
that list is in the order of the unions' ids, and holds every pair of tokens whose union is a token.
"""

import json
from types import SimpleNamespace

from nanorlhf.config import die, reason, warn
from nanorlhf.data.dialogue import ENDS, TEMPLATES, as_text
from nanorlhf.data.values import as_messages
from nanorlhf.hf.folder import read_json
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


OTHER_TEMPLATE = """
{{- START -}}
{%- if SYSTEM and (not messages or messages[0]["role"] != "system") -%}
  {{- BEFORE["system"] + SYSTEM + AFTER["system"] -}}
{%- endif -%}
{%- for message in messages -%}
  {{- BEFORE[message["role"]] + WORDS + AFTER[message["role"]] -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- BEFORE["assistant"] -}}{%- endif -%}
"""


def jinja_of(tokenizer):
    """The chat template of a tokenizer's style in transformers' language."""
    if tokenizer.style == "nanorlhf":
        return CHAT_TEMPLATE.strip().replace(EOS, tokenizer.eos)
    template, source = TEMPLATES[tokenizer.style], OTHER_TEMPLATE.strip()
    parts = {"START": template.start, "SYSTEM": tokenizer.system}
    parts |= {"BEFORE": template.before, "AFTER": template.after}
    for name, value in parts.items():
        source = source.replace(name, json.dumps(value))
    return source.replace("WORDS", f'(message["content"]{" | trim" if template.strips else ""})')


def byte_symbols():
    """{byte: the visible character that stands for it in GPT-2's files}."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


# ---- in ----------------------------------------------------------------------------------------

DIGITS_APART = (  # every digit is a word, also to what stands before it
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
)


def read_tokenizer(
    folder, vocab_size, keep_special=False, eos_id=None, style="nanorlhf", system=""
):
    """The Tokenizer of a folder's files, which must be a byte-level BPE. Without files it is
    GPT-2's own, if `vocab_size` is GPT-2's. Special tokens other than ours are left out, or with
    `keep_special` they keep their ids and serve where they can; then `eos_id` is what config.json
    says ends a text, where `style`, the chat template, does not decide that."""
    try:
        if (folder / "tokenizer.json").exists():
            vocab, merges, pattern, added, nfc = _read_tokenizer_json(folder / "tokenizer.json")
        elif (folder / "vocab.json").exists():
            vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            merges = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
            merges = [tuple(m.split(" ")) for m in merges if m and not m.startswith("#version")]
            pattern, added, nfc = GPT2_PATTERN, {}, False
        elif vocab_size == 50257:
            return gpt2_tokenizer()
        else:
            die(f"{folder}: no tokenizer.json and no vocab.json in it")
        ranks = _ranks(vocab, merges, added)
        if keep_special:
            special = _special(folder, ranks, added, vocab, eos_id, style)
            return Tokenizer(pattern, ranks, *special, nfc, style, system)
        tokenizer = Tokenizer(pattern, ranks, nfc=nfc)
        theirs = {token: vocab[token] for token in SPECIAL if token in vocab} | added
        if theirs.get(EOS, tokenizer.eos_id) != tokenizer.eos_id:
            raise ValueError(f"{EOS} has id {theirs[EOS]}, not the first behind the others")
        if lost := [t for t, i in theirs.items() if tokenizer.special.get(t) != i]:
            warn(f"special tokens {', '.join(lost)} are not ours and are left out")
        return tokenizer
    except Exception as error:  # a damaged file can fail in any of these steps, and in many ways
        die(f"{folder}: its tokenizer cannot be read as a byte-level BPE: {reason(error)}")


def _read_tokenizer_json(path):
    """(vocabulary, merges, pattern, added tokens, whether text is normalised to NFC)."""
    content = json.loads(path.read_text(encoding="utf-8"))
    pre = content["pre_tokenizer"]
    steps = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    kinds, last = [step["type"] for step in steps], steps[-1]
    if kinds == ["ByteLevel"] and last.get("use_regex", True):
        pattern = GPT2_PATTERN
    elif kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
        if steps[0]["behavior"] != "Isolated" or steps[0].get("invert"):
            raise ValueError(f"pre-tokenizer {steps[0]}")
        pattern = steps[0]["pattern"]["Regex"]
    elif kinds == ["Digits", "ByteLevel"] and last.get("use_regex", True):
        if not steps[0].get("individual_digits"):
            raise ValueError(f"pre-tokenizer {steps[0]}")
        pattern = DIGITS_APART
    else:
        raise ValueError(f"pre-tokenizers {kinds}")
    if content.get("normalizer") not in (None, {"type": "NFC"}) or last.get("add_prefix_space"):
        raise ValueError("it changes the text before it splits it")
    model = content["model"]
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback") or model.get("dropout"):
        raise ValueError(f"a model {model.get('type')} with byte_fallback or dropout")
    added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    return model["vocab"], merges, pattern, added, bool(content.get("normalizer"))


def _ranks(vocab, merges, added):
    """{bytes: id} of the plain tokens. ValueError where tiktoken cannot encode as they do."""
    byte_of = {symbol: b for b, symbol in byte_symbols().items()}
    as_bytes = lambda token: bytes(byte_of[symbol] for symbol in token)
    plain = {token: i for token, i in vocab.items() if token not in added and token not in SPECIAL}
    ranks = {as_bytes(token): i for token, i in plain.items()}
    unions = [ranks[as_bytes(a) + as_bytes(b)] for a, b in merges]
    longer = {i for token, i in ranks.items() if len(token) > 1}
    if unions != sorted(unions) or set(unions) != longer or len(ranks) < len(plain):
        raise ValueError("its merges are not in the order of its ids")
    return ranks


def _special(folder, ranks, added, vocab, eos_id, style):
    """({name: id} of another model's special tokens with ours for the roles, eos, pad). Its own are
    used where they serve: the pad is the one that it names, if that is not its eos; or one that is
    for nothing else here."""
    special = dict(added) | {name: vocab[name] for name in SPECIAL if name in vocab}
    files = ("special_tokens_map.json", "tokenizer_config.json")
    settings = {key: word for file in files for key, word in _json_of(folder / file).items()}
    names = {i: name for name, i in special.items()}
    first = eos_id[0] if isinstance(eos_id, list) and eos_id else eos_id
    eos = ENDS.get(style, _name(settings.get("eos_token")) or names.get(first))
    if eos not in special:
        raise ValueError(f"its end of a text, {eos!r}, is no special token")
    spare = [name for name in special if "pad" in name or "endoftext" in name]
    candidates = [_name(settings.get("pad_token")), *spare]
    pad = next((name for name in candidates if name in special and name != eos), PAD)
    behind = 1 + max([*ranks.values(), *special.values()])
    roles = (USER, ASSISTANT) if style == "nanorlhf" else ()
    for name in dict.fromkeys((pad, *roles)):
        if name not in special:
            special[name], behind = behind, behind + 1
    return special, eos, pad


PROBES = (  # dialogues that two templates write alike only if they are one
    [("user", "a")],
    [("user", " a\n"), ("assistant", " b "), ("user", "\nc")],
    [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")],
)


def own_template(folder):
    """(style, system): which template of dialogue.py writes the same as the folder's, and what the
    system says by default. None: the folder has no template. ("", ""): one that we do not know."""
    settings = _json_of(folder / "tokenizer_config.json")
    source, path = settings.get("chat_template"), folder / "chat_template.jinja"
    if path.exists():
        source = path.read_text(encoding="utf-8", errors="replace")
    if isinstance(source, list):
        named = [t for t in source if isinstance(t, dict) and t.get("name") == "default"]
        source = named[0].get("template") if named else None
    if not source:
        return None
    write = _renderer(source, settings)
    for style in TEMPLATES:
        plain = SimpleNamespace(style=style, system="", eos=_name(settings.get("eos_token")) or EOS)
        theirs = write(PROBES[0]) or ""
        body = as_text(plain, PROBES[0]).removeprefix(TEMPLATES[style].start)
        plain.system = _system_in(style, theirs.removesuffix(body))
        ours = [as_text(plain, p) for p in PROBES]
        if ours == [write(p) for p in PROBES]:
            return style, plain.system
    return "", ""


def _system_in(style, text):
    """What the system says in a text that is its turn; "" where it is none."""
    template = TEMPLATES[style]
    before, after = template.start + template.before.get("system", ""), template.after.get("system")
    is_turn = after and text.startswith(before) and text.endswith(after)
    return text[len(before) : len(text) - len(after)] if is_turn else ""


def _renderer(source, settings):
    """write(dialogue) -> the text that a Jinja template makes of it, None where it refuses it."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # here, as few need it; torch has it

    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    tokens = {key: _name(settings.get(key)) or "" for key in ("bos_token", "eos_token")}

    def refuse(message):
        raise ValueError(message)

    def write(dialogue):
        messages = as_messages(dialogue)
        try:
            return jinja.from_string(source).render(
                messages=messages, add_generation_prompt=True, raise_exception=refuse, **tokens
            )
        except Exception:  # a template is a program, and may fail in any way
            return None

    return write


def _name(token):
    """A special token's name, which some files keep in an object; None for anything else."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None


def _json_of(path):
    return read_json(path) if path.exists() else {}


# ---- out ---------------------------------------------------------------------------------------


def tokenizer_files(tokenizer, block_size, chat, padding_side="left"):
    """{file name: its content, for JSON}: with these files AutoTokenizer encodes as `tokenizer`. A
    text that is too long loses its left. Generation needs pads on the left; a score is read at the
    right place only where they are on the right, as transformers' GPT-2 counts positions from the
    first pad."""
    symbols = byte_symbols()
    text_of = {token: "".join(symbols[b] for b in token) for token in tokenizer.ranks}
    ordered = sorted(tokenizer.ranks, key=tokenizer.ranks.get)
    vocab = {text_of[t]: tokenizer.ranks[t] for t in ordered}
    if min(tokenizer.special.values()) < len(ordered):  # else these get the next ids anyway
        vocab = tokenizer.special | vocab
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
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    flags["special"] = True
    special = sorted((i, token) for token, i in tokenizer.special.items())
    main = {
        "version": "1.0",
        "normalizer": {"type": "NFC"} if tokenizer.nfc else None,
        "added_tokens": [{"id": i, "content": token} | flags for i, token in special],
        "pre_tokenizer": byte_level if byte_level["use_regex"] else split_first,
        "post_processor": None,
        "decoder": byte_level | {"use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "bos_token": tokenizer.eos,
        "eos_token": tokenizer.eos,
        "pad_token": tokenizer.pad,
        "padding_side": padding_side,
        "truncation_side": "left",
        "additional_special_tokens": [USER, ASSISTANT],
        "clean_up_tokenization_spaces": False,
    }
    settings |= {"chat_template": jinja_of(tokenizer)} if chat else {}
    return {"tokenizer.json": main, "tokenizer_config.json": settings}
