"""The way out: a checkpoint of ours in Hugging Face layout, as transformers loads it."""

import json
from pathlib import Path

from nanorlhf.config import die, reason
from nanorlhf.hf.folder import FIXED, GELU, TRANSPOSED, llama_names, safetensors_of
from nanorlhf.hf.tokenizer import tokenizer_files
from nanorlhf.llama import LlamaConfig
from nanorlhf.run import checkpoint


def write_model(folder, to):
    """Write a checkpoint of ours so that transformers' AutoTokenizer and the AutoModel of its kind
    load it; returns the Checkpoint."""
    safetensors, exported = safetensors_of(to), checkpoint.load(folder)
    config, tokenizer, weights = exported.model_config, exported.tokenizer, exported.weights
    is_rm, score = exported.kind == "reward", None
    if is_rm:  # (w, c): the score is w h + c, of the last norm's output h
        bias, sd = weights["score_head.bias"] - weights["score_mean"], weights["score_sd"]
        score = weights["score_head.weight"] / sd, bias / sd
    in_their_layout = llama_layout if isinstance(config, LlamaConfig) else gpt2_layout
    description, tensors = in_their_layout(config, checkpoint.gpt_weights(weights), score)
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
        path = Path(to, "model.safetensors")
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    except (OSError, safetensors.SafetensorError) as error:
        die(f"{to}: {reason(error)}")
    return exported


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
    description = FIXED | {
        "model_type": "gpt2",
        "tie_word_embeddings": True,
        "architectures": ["GPT2ForSequenceClassification" if score else "GPT2LMHeadModel"],
        "n_positions": config.block_size,
        "activation_function": {ours: theirs for theirs, ours in GELU.items()}[config.gelu],
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.d_model,
    }
    return description, tensors


def llama_layout(config, weights, score):
    """(config.json, tensors) of a Llama, as of the family member that has its biases and norms. Its
    last norm has no bias to take up the constant c of a reward model's score: config.json names it,
    to be added."""
    c, tensors, description = config, {}, {}
    kind = "qwen3" if c.qk_norm else "qwen2" if c.qkv_bias else "llama"
    if c.qk_norm and c.qkv_bias:
        die("a Llama with biases and norms of queries and keys is no model of transformers'")
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
    head = "ForSequenceClassification" if score else "ForCausalLM"
    description |= {
        "model_type": kind,
        "tie_word_embeddings": c.is_tied,
        "architectures": [kind.capitalize() + head],
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
    others = {path.name for path in Path(to).glob("[!.]*")}
    try:
        if "nanorlhf_stage" in json.loads(Path(to, "config.json").read_text()):
            others -= names
    except (OSError, ValueError):
        pass  # no export of ours
    if others:
        shown = ", ".join(sorted(others)[:4])
        die(f"{to} holds files that are no export of nanorlhf's: {shown}; name another folder")
