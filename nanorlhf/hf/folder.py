"""A model in Hugging Face layout: its files, and what this project calls what is in them.

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

LLAMAS = ("llama", "mistral", "qwen2", "qwen3", "smollm3")  # model_type of what llama.py is
SIZES = {  # of a config of ours, and the key in their config.json
    "gpt2": "vocab_size=vocab_size block_size=n_positions n_layer=n_layer n_head=n_head "
    "d_model=n_embd",
    "llama": "vocab_size=vocab_size block_size=max_position_embeddings n_layer=num_hidden_layers "
    "n_head=num_attention_heads d_model=hidden_size n_kv_head=num_key_value_heads d_head=head_dim "
    "d_mlp=intermediate_size",
}
FIXED = {  # keys of which we know one value only; an absent key has this value
    "gpt2": {
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    "llama": {
        "hidden_act": "silu",
        "mlp_bias": False,
        "attention_bias": False,  # Qwen2 has it of queries, keys and values, and does not say so
        "use_sliding_window": False,
        "partial_rotary_factor": 1.0,
    },
}
GELU = {"gelu_new": "tanh", "gelu": "none"}  # their activation_function -> GPTConfig.gelu
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
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


def download(name, files):
    """The folder into which huggingface_hub has fetched these files of a model, and its weights."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        die(f"{name} is fetched by huggingface_hub: pip install -e '.[hub]'; or give a folder")
    try:
        for weights in ("model*.safetensors*", "pytorch_model*.bin*"):
            folder = Path(snapshot_download(name, allow_patterns=["config.json", *files, weights]))
            if list(folder.glob(weights)):
                break
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
    """{name: tensor in float32} of a folder: of model.safetensors or, where there is none, of its
    parts model-*, or of the same with .bin."""
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        whole = folder / f"{stem}{suffix}"
        if files := [whole] if whole.exists() else sorted(folder.glob(f"{stem}-*{suffix}")):
            return {k: w.float() for path in files for k, w in read_file(path).items()}
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
    if kind not in ("gpt2", *LLAMAS) or "ForSequence" in str(config.get("architectures")):
        what, known = config.get("architectures") or kind, ", ".join(("gpt2", *LLAMAS))
        die(f"{folder}: architecture {what}; what can be read are language models of type {known}")
    if "quantization_config" in config:
        die(f"{folder}: its weights are quantised; give a folder with them in 16 or 32 bits")
    family, make = ("gpt2", gpt2_options) if kind == "gpt2" else ("llama", llama_options)
    for key, value in FIXED[family].items():
        if config.get(key, value) != value:
            die(f"{folder}: {key} is {config[key]!r}; what can be read has {value!r}")
    try:
        sizes = {ours: config.get(key) for ours, key in sizes_of(family)}
        for ours, key in sizes_of(family):
            if type(sizes[ours]) is not int and ours not in ("n_kv_head", "d_head"):
                raise ValueError(f"{key} is {sizes[ours]!r}, no number")
        return checked(make(config, sizes, folder))
    except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        die(f"{folder}/config.json: {type(error).__name__}: {reason(error)}")


def checked(c):
    """The same config, if a model can be made of it; else raises ValueError."""
    is_llama = isinstance(c, LlamaConfig)
    sizes = [getattr(c, ours) for ours, _ in sizes_of("llama" if is_llama else "gpt2")]
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


def sizes_of(family):
    """[(the name in a config of ours, the key in their config.json)]."""
    return [pair.split("=") for pair in SIZES[family].split()]


def gpt2_options(config, sizes, folder):
    gelu, n_inner = config.get("activation_function", "gelu_new"), config.get("n_inner")
    if gelu not in GELU:
        die(f"{folder}: activation_function is {gelu!r}, not {' or '.join(GELU)}")
    if n_inner not in (None, 4 * sizes["d_model"]):
        die(f"{folder}: n_inner is {n_inner}, not 4 times n_embd")
    return GPTConfig(**sizes, gelu=GELU[gelu])


def llama_options(config, sizes, folder):
    """Qwen2 has a bias on queries, keys and values, Qwen3 a norm on queries and keys, SmolLM3 no
    positions in each fourth block. Within the window of its attention Mistral is a Llama."""
    kind = config["model_type"]
    # rope_parameters is what transformers 5 writes, rope_theta and rope_scaling what 4 did
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters is {rope!r}")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        die(f"{folder}: rotary scaling {rope_type!r}; what can be read are default and llama3")
    if kind == "mistral" and config.get("sliding_window"):
        sizes["block_size"] = min(sizes["block_size"], config["sliding_window"])
    n_every = config.get("no_rope_layer_interval", 4) if kind == "smollm3" else 0
    rotated = [int(not n_every or (i + 1) % n_every > 0) for i in range(sizes["n_layer"])]
    if config.get("no_rope_layers") not in (None, rotated):
        die(f"{folder}: no_rope_layers is {config['no_rope_layers']}, not {rotated}")
    sizes["n_kv_head"] = sizes["n_kv_head"] or sizes["n_head"]
    sizes["d_head"] = sizes["d_head"] or sizes["d_model"] // sizes["n_head"]
    return LlamaConfig(
        **sizes,
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        rope_scaling={key: rope[key] for key in SCALING} if rope_type == "llama3" else None,
        nope_every=n_every,
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
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
