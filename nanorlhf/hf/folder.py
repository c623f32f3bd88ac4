"""A model in Hugging Face layout: fetched by name, read, and turned into this project's names.

The architectures are those of model.py and llama.py. GPT-2's names differ from ours by a prefix,
and its matrices are stored transposed (Conv1D). Of Llama's, some stand side by side in one of ours.
"""

import json
from pathlib import Path

import torch

from nanorlhf.config import die, reason
from nanorlhf.llama import SCALING, LlamaConfig, make_gpt
from nanorlhf.machine.durable import read_tensors
from nanorlhf.model import GPTConfig

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# keys of their config.json for which model.py knows one value only; an absent key has this value
FIXED = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
GELU = {"gelu_new": "tanh", "gelu": "none"}  # their activation_function -> GPTConfig.gelu
LLAMA_TYPES = ("llama", "qwen2", "qwen3")  # model_type of what llama.py is
# the same for Llama's; a key that is there must have this value
LLAMA_FIXED = {"hidden_act": "silu", "mlp_bias": False, "use_sliding_window": False}
NAMES = {  # ours in a Llama's block: theirs, side by side
    "ln_1.": ["input_layernorm."],
    "attn.c_attn.": ["self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."],
    "attn.c_proj.": ["self_attn.o_proj."],
    "attn.q_norm.": ["self_attn.q_norm."],
    "attn.k_norm.": ["self_attn.k_norm."],
    "ln_2.": ["post_attention_layernorm."],
    "mlp.c_fc.": ["mlp.gate_proj.", "mlp.up_proj."],
    "mlp.c_proj.": ["mlp.down_proj."],
}
# stored beside the weights, and no weights
BUFFERS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")
OUTER = {"wte.weight": "embed_tokens.weight", "ln_f.weight": "norm.weight"}


def download(name):
    """The folder into which huggingface_hub has fetched what we read of a model."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        die(f"{name} is fetched by huggingface_hub: pip install -e '.[hub]'; or give a folder")
    files = ["config.json", "*token*.json", "chat_template.jinja", "vocab.json", "merges.txt"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*files, "model*.safetensors*"]))
        if not list(folder.glob("model*.safetensors*")):
            folder = Path(snapshot_download(name, allow_patterns=[*files, "pytorch_model*.bin*"]))
    except Exception as error:  # whatever the network raises: there is one thing to say
        die(f"{name}: could not be downloaded ({type(error).__name__}: {reason(error)})")
    return folder


def read_json(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        die(f"{path}: cannot be read ({reason(error)})")
    if not isinstance(content, dict):
        die(f"{path}: not an object")
    return content


def read_weights(folder):
    """{name: tensor in float32} of a folder: from safetensors or, where there are none, from .bin.
    Either is one file, or several that an index lists."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        files, index = [name], folder / f"{name}.index.json"
        if index.exists():
            file_of = read_json(index).get("weight_map")
            if not isinstance(file_of, dict):
                die(f"{index}: 'weight_map' does not name a file for each tensor")
            files = sorted(set(map(str, file_of.values())))
        elif not (folder / name).exists():
            continue
        return {k: w.float() for file in files for k, w in read_file(folder / file).items()}
    die(f"{folder}: neither model.safetensors nor pytorch_model.bin in it")


def read_file(path):
    read = read_tensors if path.suffix == ".bin" else safetensors_of(path).torch.load_file
    try:
        return read(path)
    except Exception as error:  # safetensors raises its own, and either some more
        die(f"{path}: cannot be read ({reason(error)})")


def safetensors_of(path):
    """The package, to read or write what is at a path."""
    try:
        import safetensors.torch
    except ImportError:
        die(f"{path} needs safetensors: pip install -e '.[hub]'")
    return safetensors


def model_config_of(config, folder):
    """config.json -> GPTConfig or LlamaConfig. What these models do not do is named, with exit
    status 2."""
    kind = config.get("model_type")
    if kind not in ("gpt2", *LLAMA_TYPES) or "ForSequence" in str(config.get("architectures")):
        about = config.get("architectures") or kind
        known = ", ".join(("gpt2", *LLAMA_TYPES))
        die(f"{folder}: architecture {about}; what can be read are language models of type {known}")
    if "quantization_config" in config:
        die(f"{folder}: its weights are quantised; give a folder with them in 16 or 32 bits")
    fixed, make = (FIXED, gpt2_config) if kind == "gpt2" else (LLAMA_FIXED, llama_config)
    if kind in ("llama", "qwen3"):  # Qwen2 has these biases, and its files do not say so
        fixed = fixed | {"attention_bias": False}
    for key, value in fixed.items():
        if config.get(key, value) != value:
            die(f"{folder}: {key} is {config[key]!r}; what can be read has {value!r}")
    try:
        return checked(make(config, folder))
    except KeyError as error:
        die(f"{folder}/config.json: {error} is missing")
    except (ValueError, TypeError) as error:
        die(f"{folder}/config.json: {error}")


def checked(c):
    """The same config, if a model can be made of it; else raises ValueError."""
    is_llama = isinstance(c, LlamaConfig)
    sizes = [c.vocab_size, c.block_size, c.n_layer, c.n_head, c.d_model]
    sizes += [c.n_kv_head, c.d_head, c.d_mlp] if is_llama else []
    scaling = is_llama and c.rope_scaling or {"low_freq_factor": 1, "high_freq_factor": 2}
    numbers = [*scaling.values(), *((c.norm_eps, c.rope_theta) if is_llama else ())]
    if not (
        all(type(n) is int and 0 < n < 2**24 for n in sizes)
        and (c.n_head % c.n_kv_head + c.d_head % 2 if is_llama else c.d_model % c.n_head) == 0
        and all(type(x) in (int, float) and 0 < x < 1e12 for x in numbers)
        and scaling["low_freq_factor"] < scaling["high_freq_factor"]
    ):
        raise ValueError(f"no sizes of a model: {c}")
    return c


def gpt2_config(config, folder):
    gelu = str(config.get("activation_function", "gelu_new"))
    if gelu not in GELU:
        die(f"{folder}: activation_function is {gelu!r}, not {' or '.join(GELU)}")
    names = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
    model_config = GPTConfig(*numbers(config, names, folder), gelu=GELU[gelu])
    if config.get("n_inner") not in (None, 4 * model_config.d_model):
        die(f"{folder}: n_inner is {config['n_inner']}, not 4 times n_embd")
    return model_config


def numbers(config, names, folder):
    for name in names:
        if type(config[name]) is not int:
            die(f"{folder}/config.json: {name} is {config[name]!r}, no number")
    return [config[name] for name in names]


def llama_config(config, folder):
    """Qwen2 has a bias on queries, keys and values, Qwen3 a norm on queries and keys."""
    # rope_parameters is what transformers 5 writes, rope_theta and rope_scaling what 4 did
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        die(f"{folder}/config.json: rope_parameters is {rope!r}")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        die(f"{folder}: rotary scaling {rope_type!r}; what can be read are default and llama3")
    names = ("vocab_size", "max_position_embeddings", "num_hidden_layers", "num_attention_heads")
    names += ("hidden_size", "intermediate_size")
    sizes = numbers(config, names, folder)
    n_head, d_model, d_mlp = sizes[3:]
    return LlamaConfig(
        *sizes[:5],
        n_kv_head=config.get("num_key_value_heads") or n_head,
        d_head=config.get("head_dim") or d_model // max(n_head, 1),
        d_mlp=d_mlp,
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        rope_scaling={key: rope[key] for key in SCALING} if rope_type == "llama3" else None,
        qkv_bias=config["model_type"] == "qwen2",
        qk_norm=config["model_type"] == "qwen3",
        is_tied=config.get("tie_word_embeddings", False),
    )


def llama_names(name):
    """Their names for a tensor of our Llama: several where they stand side by side in ours."""
    if name in OUTER:
        return ["model." + OUTER[name]]
    if name == "lm_head.weight":
        return [name]
    layer, inner = name.removeprefix("h.").split(".", 1)
    ours = next(key for key in NAMES if inner.startswith(key))
    return [f"model.layers.{layer}.{key}{inner.removeprefix(ours)}" for key in NAMES[ours]]


def convert(theirs, model_config, folder):
    """Their weights under our names and in our layout. The first tensor that is missing or has
    another shape than `model_config` wants is named, with exit status 2."""
    is_llama = isinstance(model_config, LlamaConfig)
    with torch.device("meta"):
        shapes = {n: tuple(w.shape) for n, w in make_gpt(model_config).state_dict().items()}
    theirs = {n.removeprefix("transformer."): w for n, w in theirs.items()}
    theirs = {n: w for n, w in theirs.items() if not n.endswith(BUFFERS)}
    # where ours has no head of its own, it is the embedding: theirs may be stored a second time
    head = None if "lm_head.weight" in shapes else theirs.pop("lm_head.weight", None)
    ours = {}
    for name, shape in shapes.items():
        names = llama_names(name) if is_llama else [name]
        if lost := [key for key in names if key not in theirs]:
            die(f"{folder}: tensor {lost[0]} is missing")
        parts = [theirs.pop(key) for key in names]
        if len({w.shape[1:] for w in parts}) > 1:
            die(f"{folder}: tensors {', '.join(names)} do not fit each other")
        w = torch.cat(parts) if len(parts) > 1 else parts[0]
        is_transposed = not is_llama and name.endswith(TRANSPOSED)
        expected = shape[::-1] if is_transposed else shape
        if tuple(w.shape) != expected:
            die(f"{folder}: tensor {name} has shape {tuple(w.shape)}, expected {expected}")
        ours[name] = w.T.contiguous() if is_transposed else w
    if theirs:
        die(f"{folder}: tensor {next(iter(theirs))} has no place in this architecture")
    if not is_llama and head is not None and not torch.equal(head, ours["wte.weight"]):
        die(f"{folder}: tensor lm_head.weight differs from wte.weight; GPT-2's are tied")
    return ours
