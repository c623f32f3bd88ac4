"""The way out: a checkpoint of ours in Hugging Face layout, as transformers loads it."""

import json
from pathlib import Path

import torch

from nanorlhf.config import die, reason
from nanorlhf.hf.folder import FIXED, GELU, TRANSPOSED, llama_names, safetensors_of, sizes_of
from nanorlhf.hf.template import OURS
from nanorlhf.hf.tokenizer import engines
from nanorlhf.llama import LlamaConfig
from nanorlhf.tokenizer import EOS, PAD, Tokenizer


def write_model(to, exported, weights, dtype="float32"):
    """Write a Checkpoint so that transformers' AutoTokenizer and the AutoModel of its kind load it.
    weights: the GPT's and, of a reward model, its head's."""
    safetensors = safetensors_of(to)
    config, tokenizer = exported.model_config, exported.tokenizer
    is_rm, score = exported.kind == "reward", None
    if is_rm:  # (w, c): the score is w h + c, of the last norm's output h
        head = {name: weights.pop(name) for name in list(weights) if name.startswith("score_")}
        bias, sd = head["score_head.bias"] - head["score_mean"], head["score_sd"]
        score = head["score_head.weight"] / sd, bias / sd
    in_their_layout = llama_layout if isinstance(config, LlamaConfig) else gpt2_layout
    description, tensors = in_their_layout(config, weights, score)
    files, n_rows = tokenizer_files(tokenizer, config.block_size, is_rm)
    for name in tensors:
        if name.endswith(("wte.weight", "embed_tokens.weight", "lm_head.weight")):
            tensors[name] = tensors[name][:n_rows].clone()
    family = "llama" if isinstance(config, LlamaConfig) else "gpt2"
    description |= {theirs: getattr(config, ours) for ours, theirs in sizes_of(family)}
    description |= {
        "nanorlhf_stage": exported.stage,
        "nanorlhf_kind": exported.kind,
        "nanorlhf_chat": tokenizer.chat,
        "vocab_size": n_rows,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.ends[0] if len(tokenizer.ends) == 1 else list(tokenizer.ends),
        "pad_token_id": tokenizer.pad_id if tokenizer.pad_id < n_rows else None,
        "torch_dtype": dtype,
    }
    if is_rm:  # a pipeline would put a sigmoid on anything but a regression's score
        description |= {"num_labels": 1, "problem_type": "regression"}
    files["config.json"] = as_json(description)
    refuse_others(to, {*files, "model.safetensors", "README.md"})
    try:
        Path(to).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            Path(to, name).write_bytes(content)
        tensors = {name: w.to(getattr(torch, dtype)) for name, w in tensors.items()}
        path = Path(to, "model.safetensors")
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    except (OSError, safetensors.SafetensorError) as error:
        die(f"{to}: {reason(error)}")


def gpt2_layout(config, weights, score):
    """(config.json, tensors) of a GPT-2; `score`: of a reward model. Their head has no bias, so c
    goes into the bias of the last norm: w (h + c w / |w|^2) = w h + c."""
    tensors = {}
    for name, w in weights.items():
        stored = w.T if name.endswith(TRANSPOSED) else w
        tensors["transformer." + name] = stored.contiguous()
    if score:
        w, c = score  # (1, D), (1,)
        tensors["score.weight"] = w
        tensors["transformer.ln_f.bias"] = weights["ln_f.bias"] + c * w[0] / w.square().sum()
    description = FIXED["gpt2"] | {
        "model_type": "gpt2",
        "tie_word_embeddings": True,
        "architectures": ["GPT2ForSequenceClassification" if score else "GPT2LMHeadModel"],
        "activation_function": {ours: theirs for theirs, ours in GELU.items()}[config.gelu],
    }
    return description, tensors


def llama_layout(config, weights, score):
    """(config.json, tensors) of a Llama, as of the family member that has its options. Its last
    norm has no bias to take up the constant c of a reward model's score: config.json names it, to
    be added."""
    c, tensors, description = config, {}, {}
    kinds = {"qwen3": c.qk_norm, "qwen2": c.qkv_bias, "smollm3": c.nope_every}
    kinds = [kind for kind, has_it in kinds.items() if has_it] or ["llama"]
    if len(kinds) > 1:
        die(f"a Llama with what {' and '.join(kinds)} have is no model of transformers'")
    q_k_v = [n * c.d_head for n in (c.n_head, c.n_kv_head, c.n_kv_head)]
    for name, w in weights.items():
        names = llama_names(name)
        parts = w.split(q_k_v) if len(names) == 3 else w.chunk(len(names))
        tensors |= {key: part.clone() for key, part in zip(names, parts)}
    if score:
        tensors.pop("lm_head.weight", None)
        tensors["score.weight"] = score[0]
        description["nanorlhf_score_shift"] = score[1].item()
    rope = {"rope_type": "llama3" if c.rope_scaling else "default", "rope_theta": c.rope_theta}
    class_of = {"smollm3": "SmolLM3"}.get(kinds[0], kinds[0].capitalize())
    description |= FIXED["llama"] | {
        "model_type": kinds[0],
        "tie_word_embeddings": c.is_tied,
        "architectures": [class_of + ("ForSequenceClassification" if score else "ForCausalLM")],
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_parameters": rope | (c.rope_scaling or {}),
    }
    description |= {"rope_scaling": rope | c.rope_scaling} if c.rope_scaling else {}
    description |= {"no_rope_layer_interval": c.nope_every} if c.nope_every else {}
    return description, tensors


def refuse_others(to, names):
    """Exits 2 where the folder holds anything but an earlier export. Of another model's files some
    would be preferred to ours, such as its chat template, and the rest would be lost."""
    others = {path.name for path in Path(to).glob("[!.]*")}
    try:
        if "nanorlhf_stage" in json.loads(Path(to, "config.json").read_text()):
            others -= names
    except (OSError, ValueError):
        pass  # no export of ours
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
        settings |= dict.fromkeys(("bos_token", "eos_token"), EOS)
        settings |= {"additional_special_tokens": list(tokenizer.special)[2:]}
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
    package, symbols = engines(), byte_symbols()
    ordered = sorted(tokenizer.ranks, key=tokenizer.ranks.get)
    text_of = {token: "".join(symbols[b] for b in token) for token in ordered}
    halves = ((t[:i], t[i:]) for t in ordered for i in range(1, len(t)))
    merges = [(text_of[a], text_of[b]) for a, b in halves if a in text_of and b in text_of]
    vocab = {text: tokenizer.ranks[token] for token, text in text_of.items()}
    engine = package.Tokenizer(package.models.BPE(vocab=vocab, merges=merges))
    split = package.pre_tokenizers.Split(package.Regex(tokenizer.pattern), "isolated")
    in_bytes = package.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.pre_tokenizer = package.pre_tokenizers.Sequence([split, in_bytes])
    engine.decoder = package.decoders.ByteLevel()
    engine.add_special_tokens(list(tokenizer.special))
    return engine.to_str().encode()


def byte_symbols():
    """{byte: the visible character that stands for it in GPT-2's files}."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def as_json(content):
    return json.dumps(content, indent=1).encode()
