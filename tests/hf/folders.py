"""Small folders in Hugging Face layout, made by the field's own tools, with its models' habits."""

import json

import pytest

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

TEXT = [
    "The red cat sees the old hill; user, assistant and system say: it isn't 1234!\n\n",
    "a small boat holds 12 lamps,  été e\u0301 你好 🦊\t\r\n  x",
] * 30
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(regex):
    return tokenizers.pre_tokenizers.Split(tokenizers.Regex(regex), "isolated")


def in_bytes(use_regex=False):
    return tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


BYTE_LEVEL = {  # how a family cuts text
    "gpt2": [in_bytes(True)],
    "smollm2": [tokenizers.pre_tokenizers.Digits(individual_digits=True), in_bytes(True)],
    "llama3": [split(LLAMA3), in_bytes()],
    "qwen2": [split(LLAMA3.replace("{1,3}", "")), in_bytes()],
}


def byte_level(family="llama3", special=(), nfc=False, size=420):
    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    engine.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(BYTE_LEVEL[family])
    engine.normalizer = tokenizers.normalizers.NFC() if nfc else None
    engine.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    engine.train_from_iterator(
        TEXT,
        tokenizers.trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=list(special),
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return engine


def sentencepiece(special=()):
    """BPE with byte fallback, as of Llama 2, TinyLlama and Mistral."""
    engine = tokenizers.Tokenizer(
        tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    steps = tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")
    engine.normalizer = tokenizers.normalizers.Sequence(list(steps))
    decoders = tokenizers.decoders
    steps = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
    engine.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    of_bytes = [f"<0x{b:02X}>" for b in range(256)]
    engine.train_from_iterator(
        TEXT,
        tokenizers.trainers.BpeTrainer(
            vocab_size=420, special_tokens=["<unk>", "<s>", "</s>", *of_bytes], show_progress=False
        ),
    )
    content = json.loads(engine.to_str())  # the bytes are ordinary tokens there
    content["added_tokens"] = content["added_tokens"][:3]
    engine = tokenizers.Tokenizer.from_str(json.dumps(content))
    engine.add_special_tokens(list(special))
    return engine


def write(folder, engine, template=None, kind="llama", n_spare=0, **names):
    """The folder of a random model with this tokenizer; returns transformers' own tokenizer of it.
    n_spare: rows of the embedding that belong to no token."""
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=engine, **names)
    fast.chat_template = template
    fast.save_pretrained(folder)
    small_model(kind, len(fast) + n_spare, fast).save_pretrained(folder)
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def small_model(kind, vocab_size, fast):
    import torch

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    ids = {f"{n}_token_id": getattr(fast, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=vocab_size, max_position_embeddings=256, **sizes | ids
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, 0 if p.dim() > 1 else 1, 0.08)
    return model.eval()


# ---- chat templates, written anew, with the habits of those of the field -----------------------

TURNS = "{%- for m in messages -%}"
END = "{%- endfor -%}"
CHATML_TURN = "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}"
CHATML_ASKS = "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
ROLE = "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' -}}"
CHATML = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
CHATML_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

TEMPLATES = {  # name: (template, engine, names of special tokens, whether it takes a system turn)
    "a default system text": (
        TURNS + "{%- if loop.first and m.role != 'system' -%}"
        "{{- '<|im_start|>system\nBe kind.<|im_end|>\n' -}}{%- endif -%}"
        f"{CHATML_TURN}{END}{CHATML_ASKS}",
        lambda: byte_level("smollm2", CHATML_SPECIAL),
        CHATML,
        True,
    ),
    "a date, and words are trimmed": (
        "{{- bos_token + '<|start_header_id|>system<|end_header_id|>\n\nToday: ' -}}"
        "{{- strftime_now('%d %b %Y') + '<|eot_id|>' -}}"
        f"{TURNS}{ROLE}{{{{- m.content | trim + '<|eot_id|>' -}}}}{END}"
        "{%- if add_generation_prompt -%}"
        "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}",
        lambda: byte_level("llama3", HEADERS),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        True,
    ),
    "thoughts are cut from earlier turns, and empty ones asked for": (
        "{%- set ns = namespace(last=-1, behind=false) -%}{%- for m in messages -%}"
        "{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
        f"{TURNS}"
        "{%- set words = m.content -%}{%- set thoughts = '' -%}"
        "{%- if m.role == 'assistant' and '</think>' in words -%}"
        "{%- set thoughts = words.split('</think>')[0].split('<think>')[-1].strip('\n') -%}"
        "{%- set words = words.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}"
        "{{- '<|im_start|>' + m.role + '\n' -}}"
        "{%- if m.role == 'assistant' and ns.behind -%}"
        "{{- '<think>\n' + thoughts + '\n</think>\n\n' -}}{%- endif -%}"
        "{{- words + '<|im_end|>\n' -}}"
        "{%- if loop.index0 == ns.last -%}{%- set ns.behind = true -%}{%- endif -%}"
        f"{END}{CHATML_ASKS}"
        "{%- if add_generation_prompt and enable_thinking is false -%}"
        "{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}",
        lambda: with_thoughts(byte_level("qwen2", CHATML_SPECIAL, nfc=True)),
        CHATML,
        True,
    ),
    "roles are plain text": (
        TURNS
        + "{{- '<|' + m.role + '|>\n' + m.content + eos_token + '\n' -}}"
        + END
        + "{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}",
        sentencepiece,
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        True,
    ),
    "the system speaks in the first user turn": (
        "{{- bos_token -}}{%- set ns = namespace(system='') -%}"
        f"{TURNS}"
        "{%- if m.role == 'system' -%}{%- set ns.system = m.content + '\n\n' -%}"
        "{%- elif m.role == 'user' -%}{{- '[INST] ' + ns.system + m.content + ' [/INST]' -}}"
        "{%- set ns.system = '' -%}"
        "{%- else -%}{% generation %}{{- ' ' + m.content + ' ' + eos_token -}}{% endgeneration %}"
        "{%- endif -%}" + END,
        sentencepiece,
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"},
        True,
    ),
    "a system turn is refused, and the assistant has another name": (
        "{{- bos_token -}}{%- if messages[0].role == 'system' -%}"
        "{{- raise_exception('no system role') -}}{%- endif -%}"
        f"{TURNS}"
        "{%- set role = 'model' if m.role == 'assistant' else m.role -%}"
        "{{- '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' -}}"
        + END
        + "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}",
        lambda: sentencepiece(("<start_of_turn>", "<end_of_turn>")),
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        False,
    ),
}


def with_thoughts(engine):
    """Added tokens that are not special, as of Qwen3; one of them a word of a field."""
    engine.add_tokens(["<think>", "</think>", "ACME"])
    return engine


def chat_folder(folder, name, **more):
    """(transformers' tokenizer, whether it takes a system turn) of one of TEMPLATES."""
    template, make, names, takes_system = TEMPLATES[name]
    return write(folder, make(), template, **names | more), takes_system
