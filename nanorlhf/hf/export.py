"""The way out: a checkpoint of ours in Hugging Face layout, as transformers loads it."""

import json
from pathlib import Path

from nanorlhf.config import die, reason
from nanorlhf.hf.folder import FIXED, GELU, TRANSPOSED, llama_names
from nanorlhf.hf.tokenizer import tokenizer_files
from nanorlhf.llama import LlamaConfig
from nanorlhf.run import checkpoint


def write_model(folder, to):
    """Write a checkpoint of ours so that transformers' AutoTokenizer and the AutoModel of its kind
    load it; returns the Checkpoint."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        die("export needs safetensors: pip install -e '.[hub]'")
    exported = checkpoint.load(folder)
    is_rm = exported.kind == "reward"
    config, tokenizer = exported.model_config, exported.tokenizer
    weights = checkpoint.gpt_weights(exported.weights)
    in_their_layout = llama_layout if isinstance(config, LlamaConfig) else gpt2_layout
    description, tensors = in_their_layout(config, weights, exported.weights if is_rm else None)
    description |= {
        "nanorlhf_stage": exported.stage,
        "nanorlhf_kind": exported.kind,
        "nanorlhf_chat": exported.chat,
        "vocab_size": config.vocab_size,
        "bos_token_id": tokenizer.eos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "torch_dtype": "float32",
    }
    if is_rm:  # a pipeline would put a sigmoid on anything but a regression's score
        description |= {"num_labels": 1, "problem_type": "regression"}
    side = "right" if is_rm else "left"
    files = {"config.json": description}
    files |= tokenizer_files(tokenizer, config.block_size, exported.chat, side)
    refuse_others(to, {*files, "model.safetensors", "README.md"})
    try:
        Path(to).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            Path(to, name).write_text(json.dumps(content, indent=1), encoding="utf-8")
        save_file(tensors, Path(to, "model.safetensors"), metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        die(f"{to}: {reason(error)}")
    return exported


def gpt2_layout(config, weights, reward):
    """(config.json, tensors) of a GPT-2. `reward`: a reward model's weights with its head, if it is
    one."""
    tensors = {}
    for name, w in weights.items():
        tensors["transformer." + name] = (
            w.T.contiguous() if name.endswith(TRANSPOSED) else w.clone()
        )
    if reward:
        fold_scale(reward, tensors)
    description = FIXED | {
        "model_type": "gpt2",
        "tie_word_embeddings": True,
        "architectures": ["GPT2ForSequenceClassification" if reward else "GPT2LMHeadModel"],
        "n_positions": config.block_size,
        "activation_function": {ours: theirs for theirs, ours in GELU.items()}[config.gelu],
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.d_model,
    }
    return description, tensors


def llama_layout(config, weights, reward):
    """(config.json, tensors) of a Llama, as of the family member that has its biases and norms. Its
    last norm has no bias to take up the constant of a reward model's score, (bias - mean) / sd:
    config.json names it, to be added."""
    c, tensors, description = config, {}, {}
    kind = "qwen3" if c.qk_norm else "qwen2" if c.qkv_bias else "llama"
    if c.qk_norm and c.qkv_bias:
        die("a Llama with biases and norms of queries and keys is no model of transformers'")
    for name, w in weights.items():
        names = llama_names(name)
        sizes = [n * c.d_head for n in (c.n_head, c.n_kv_head, c.n_kv_head)]
        if len(names) != 3:
            sizes = [len(w) // len(names)] * len(names)
        tensors |= {key: part.clone() for key, part in zip(names, w.split(sizes))}
    if reward:
        tensors.pop("lm_head.weight", None)
        tensors["score.weight"] = reward["score_head.weight"] / reward["score_sd"]
        shift = (reward["score_head.bias"] - reward["score_mean"]) / reward["score_sd"]
        description["nanorlhf_score_shift"] = shift.item()
    rope = {"rope_type": "llama3" if c.rope_scaling else "default", "rope_theta": c.rope_theta}
    family = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
    description |= {
        "model_type": kind,
        "tie_word_embeddings": c.is_tied,
        "architectures": [family + ("ForSequenceClassification" if reward else "ForCausalLM")],
        "max_position_embeddings": c.block_size,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head,
        "head_dim": c.d_head,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_mlp,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "attention_bias": False,
        "rope_theta": c.rope_theta,
        "rope_parameters": rope | (c.rope_scaling or {}),
    }
    description |= {"rope_scaling": rope | c.rope_scaling} if c.rope_scaling else {}
    return description, tensors


def refuse_others(to, names):
    """Exits 2 where the folder holds anything but an earlier export. Of another model's files some
    would be preferred to ours, such as its chat template, and the rest would be lost."""
    there = {path.name for path in Path(to).glob("[!.]*")}
    others = there - names
    try:
        is_ours = "nanorlhf_stage" in json.loads(Path(to, "config.json").read_text())
    except (OSError, ValueError):
        is_ours = False
    if others or there and not is_ours:
        shown = ", ".join(sorted(others or there)[:4])
        die(f"{to} holds files that are no export of nanorlhf's: {shown}; name another folder")


def fold_scale(weights, tensors):
    """Fold bias and scale of the score into weights that their head has, as it has no bias.

    Ours is (w h + b - mean) / sd of the final norm's output h. Theirs is w' h' with w' = w / sd and
    h' = h + c w' / |w'|^2, where c = (b - mean) / sd: the summand goes into the norm's own bias.
    """
    sd = weights["score_sd"]
    w = weights["score_head.weight"] / sd  # (1, D)
    c = (weights["score_head.bias"] - weights["score_mean"]) / sd  # (1,)
    tensors["score.weight"] = w
    tensors["transformer.ln_f.bias"] += c * w[0] / w.square().sum()
