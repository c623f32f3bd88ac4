"""The way out: a checkpoint of ours in Hugging Face layout, as transformers loads it."""

import json
from pathlib import Path

import torch

from nanorlhf.config import die, package, reason
from nanorlhf.hf.folder import FIXED, GELU, SIZES, parts_of, table, turned
from nanorlhf.hf.template import OURS
from nanorlhf.llama import LlamaConfig
from nanorlhf.model import GPTConfig
from nanorlhf.tokenizer import ASSISTANT, EOS, PAD, USER, Tokenizer


def write_model(to, exported, weights, dtype="float32"):
    """Write a Checkpoint so that transformers' AutoTokenizer and the AutoModel of its kind load it.
    weights: the GPT's and, of a reward model, its head's."""
    save_file = package("safetensors.torch", to, "hub").save_file
    from safetensors import SafetensorError

    config, tokenizer = exported.model_config, exported.tokenizer
    is_rm, is_llama = exported.kind == "reward", isinstance(config, LlamaConfig)
    files, n_rows = tokenizer_files(tokenizer, config.block_size, is_rm)
    description = describe(config, is_rm) | {
        "nanorlhf_stage": exported.stage,
        "nanorlhf_kind": exported.kind,
        "nanorlhf_chat": tokenizer.chat,
        "vocab_size": n_rows,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.ends[0] if len(tokenizer.ends) == 1 else list(tokenizer.ends),
        "pad_token_id": tokenizer.pad_id if tokenizer.pad_id < n_rows else None,
        "torch_dtype": dtype,
    }
    tensors = {}
    if is_rm:  # the score is w h + c, of the last norm's output h; their head has no bias
        sd = weights.pop("score_sd")
        w = tensors["score.weight"] = weights.pop("score_head.weight") / sd  # (1, D)
        c = (weights.pop("score_head.bias") - weights.pop("score_mean")) / sd  # (1,)
        # a pipeline would put a sigmoid on anything but a regression's score
        description |= {"num_labels": 1, "problem_type": "regression"}
        if is_llama:  # its last norm has none either: who reads the score has to add c
            description["nanorlhf_score_shift"] = c.item()
        else:  # w (h + c w / |w|^2) = w h + c
            weights["ln_f.bias"] = weights["ln_f.bias"] + c * w[0] / w.square().sum()
    for name, w in weights.items():
        w = w[:n_rows] if name in ("wte.weight", "lm_head.weight") else w
        for key, part in parts_of(name, w, config).items():
            tensors[key if is_llama else "transformer." + key] = part
    files["config.json"] = as_json(description)
    refuse_others(to, {*files, "model.safetensors", "README.md"})
    whole = {"copy": True, "memory_format": torch.contiguous_format}
    tensors = {n: turned(n, w).to(getattr(torch, dtype), **whole) for n, w in tensors.items()}
    try:
        Path(to).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            Path(to, name).write_bytes(content)
        save_file(tensors, Path(to, "model.safetensors"), {"format": "pt"})
    except (OSError, SafetensorError) as error:
        die(f"{to}: {reason(error)}")


def describe(config, is_rm):
    """config.json of a GPT-2, or of the member of Llama's family that has these options."""
    c, task = config, "ForSequenceClassification" if is_rm else "ForCausalLM"
    sizes = {theirs: getattr(c, ours) for ours, theirs in table(SIZES[type(c)]).items()}
    if type(c) is GPTConfig:
        kind, task = "GPT2", task if is_rm else "LMHeadModel"
        gelu = {ours: theirs for theirs, ours in GELU.items()}[c.gelu]
        options = {"activation_function": gelu, "tie_word_embeddings": True}
    else:
        kinds = {"Qwen3": c.qk_norm, "Qwen2": c.qkv_bias, "SmolLM3": c.nope_every}
        kind, *others = [kind for kind, has_it in kinds.items() if has_it] or ["Llama"]
        if others:
            die(f"a Llama with what {kind} and {others[0]} have is no model of transformers'")
        options = {"rms_norm_eps": c.norm_eps, "rope_theta": c.rope_theta}
        scaling = c.rope_scaling and {"rope_type": "llama3"} | c.rope_scaling
        options |= {"tie_word_embeddings": c.is_tied, "rope_scaling": scaling}
        if c.nope_every:
            options["no_rope_layer_interval"] = c.nope_every
    names = {"model_type": kind.lower(), "architectures": [kind + task]}
    return FIXED[type(c)] | sizes | options | names


def refuse_others(to, names):
    """Exits 2 where the folder holds anything but an earlier export. Of another model's files some
    would be preferred to ours, such as its chat template, and the rest would be lost."""
    config = Path(to, "config.json")
    is_ours = config.is_file() and b'"nanorlhf_stage"' in config.read_bytes()
    others = {path.name for path in Path(to).glob("[!.]*")} - (names if is_ours else set())
    if others:
        shown = ", ".join(sorted(others)[:4])
        die(f"{to} holds files that are no export of nanorlhf's: {shown}; name another folder")


# ---- tokenizers --------------------------------------------------------------------------------


def tokenizer_files(tokenizer, block_size, is_rm):
    """({file name: bytes}, rows of the embedding): with these files AutoTokenizer encodes as
    `tokenizer`. Generation needs pads on the left, which is what folders of language models say; a
    score is read at the right place only where they are on the right, as transformers' GPT-2 counts
    positions from the first pad. A text that is too long for a reward model loses its left."""
    settings = {
        "model_max_length": block_size,
        "padding_side": "right" if is_rm else "left",
        "truncation_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    if isinstance(tokenizer, Tokenizer):
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": PAD}
        settings |= {"bos_token": EOS, "eos_token": EOS}
        settings |= {"additional_special_tokens": [USER, ASSISTANT]}
        settings |= {"chat_template": OURS} if tokenizer.chat else {}
        files = {"tokenizer.json": tiktokens(tokenizer)}
        return files | {"tokenizer_config.json": as_json(settings)}, tokenizer.vocab_size
    files, is_own = dict(tokenizer.files), tokenizer.source == tokenizer.own_template
    if not is_rm and (is_own or not tokenizer.chat):
        return files, tokenizer.settings["n_rows"]
    engine = tokenizer.make_engine()
    engine.add_special_tokens(tokenizer.added)
    files["tokenizer.json"] = engine.to_str().encode()
    names = {"pad_token": tokenizer.pad, "eos_token": engine.id_to_token(tokenizer.eos_id)}
    source = without_tail(tokenizer) if is_rm else tokenizer.source
    config = tokenizer.config | names | {"chat_template": source} | (settings if is_rm else {})
    files["tokenizer_config.json"] = as_json(config)
    for name in ("chat_template.jinja", "special_tokens_map.json"):  # their content is in it
        files.pop(name, None)
    if "generation_config.json" in files:
        generation = tokenizer.json_of("generation_config.json")
        generation |= {"eos_token_id": list(tokenizer.ends), "pad_token_id": tokenizer.pad_id}
        files["generation_config.json"] = as_json(generation)
    return files, tokenizer.vocab_size


def without_tail(tokenizer):
    """The chat template without what it writes behind the end of the last turn: a reader of scores
    takes the one at the last token, and ours is at that end."""
    tail, source = json.dumps(tokenizer.tail), tokenizer.source.removesuffix("\n")
    text = "{%- set dialogue -%}{{ '' }}" + source + "{{ '' }}{%- endset -%}"
    cut = f"dialogue[:-{len(tokenizer.tail)}] if dialogue.endswith({tail}) else dialogue"
    return text + "{{- " + cut + " -}}" if tokenizer.tail else tokenizer.source


def tiktokens(tokenizer):
    """tokenizer.json of a Tokenizer. Of the adjacent pairs in a word, tiktoken first merges the one
    whose union has the lowest id; tokenizers first merges the one that comes first in the list of
    merges. So this list holds every pair whose union is a token, in the order of the unions."""
    tokenizers, symbols = package("tokenizers", "an export", "hub"), byte_symbols()
    ordered = sorted(tokenizer.ranks, key=tokenizer.ranks.get)
    text_of = {token: "".join(symbols[b] for b in token) for token in ordered}
    halves = ((t[:i], t[i:]) for t in ordered for i in range(1, len(t)))
    merges = [(text_of[a], text_of[b]) for a, b in halves if a in text_of and b in text_of]
    vocab = {text: tokenizer.ranks[token] for token, text in text_of.items()}
    engine = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(tokenizer.pattern), "isolated")
    in_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, in_bytes])
    engine.decoder = tokenizers.decoders.ByteLevel()
    engine.add_special_tokens(list(tokenizer.special))
    return engine.to_str().encode()


def byte_symbols():
    """{byte: the visible character that stands for it in GPT-2's files}."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def as_json(content):
    return json.dumps(content, indent=1).encode()
