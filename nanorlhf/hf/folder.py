"""A model in Hugging Face layout: its files, and what this project calls what is in them.

The architectures are those of model.py and llama.py. GPT-2's names differ from ours by a prefix,
and its matrices are stored transposed (Conv1D). Of Llama's, some stand side by side in one of ours.
"""

import json
import re
from pathlib import Path

import torch

from nanorlhf.config import die, package, reason
from nanorlhf.llama import SCALING, LlamaConfig
from nanorlhf.machine.durable import read_tensors
from nanorlhf.model import GPTConfig

KINDS = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "smollm3")  # model_type
SIZES = {  # our names of a config, or ours=the key in their config.json
    GPTConfig: "vocab_size block_size=n_positions n_layer n_head d_model=n_embd",
    LlamaConfig: "vocab_size block_size=max_position_embeddings n_layer=num_hidden_layers "
    "n_head=num_attention_heads d_model=hidden_size n_kv_head=num_key_value_heads d_head=head_dim "
    "d_mlp=intermediate_size",
}
FIXED = {  # keys of which we know one value only; an absent key has this value
    GPTConfig: {
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    LlamaConfig: {
        "hidden_act": "silu",
        "mlp_bias": False,
        "attention_bias": False,  # Qwen2 has it of queries, keys and values, and does not say so
        "use_sliding_window": False,
        "partial_rotary_factor": 1.0,
    },
}
UNSAID = {  # what an absent key stands for, where it is something else than in a Llama
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "smollm3": {"num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True},
}
GELU = {"gelu_new": "tanh", "gelu": "none"}  # their activation_function -> GPTConfig.gelu
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
NAMES = (  # ours in a Llama=theirs, several where these stand side by side in ours
    "wte=embed_tokens ln_f=norm ln_1=input_layernorm ln_2=post_attention_layernorm "
    "attn.c_attn=self_attn.q_proj,self_attn.k_proj,self_attn.v_proj attn.c_proj=self_attn.o_proj "
    "attn.q_norm=self_attn.q_norm attn.k_norm=self_attn.k_norm mlp.c_fc=mlp.gate_proj,mlp.up_proj "
    "mlp.c_proj=mlp.down_proj"
)
BUFFERS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")  # stored, and no weights


def download(name, files):
    """The folder into which huggingface_hub has fetched these files of a model, and its weights."""
    hub = package("huggingface_hub", f"{name}, which is no folder,", "hub")
    try:
        for weights in ("model*.safetensors*", "pytorch_model*.bin*"):
            files = ["config.json", *files, weights]
            folder = Path(hub.snapshot_download(name, allow_patterns=files))
            if any(folder.glob(weights)):
                break
    except Exception as error:  # whatever the network raises: there is one thing to say
        die(f"{name}: could not be downloaded ({type(error).__name__}: {reason(error)})")
    return folder


def read_json(path, content=None):
    """The object in a JSON file, or in the bytes of one."""
    try:
        return dict(json.loads(path.read_bytes() if content is None else content).items())
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        die(f"{path}: no JSON object ({reason(error)})")


def read_weights(folder):
    """{name: tensor in float32} of a folder: of model.safetensors or, where there is none, of its
    parts model-*, or of the same with .bin."""
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        whole = folder / f"{stem}{suffix}"
        if files := [whole] if whole.exists() else sorted(folder.glob(f"{stem}-*{suffix}")):
            return {k: w.float() for path in files for k, w in read_file(path).items()}
    die(f"{folder}: neither model.safetensors nor pytorch_model.bin in it")


def read_file(path):
    is_bin = path.suffix == ".bin"
    load = read_tensors if is_bin else package("safetensors.torch", path, "hub").load_file
    try:
        return load(path)
    except Exception as error:  # safetensors raises its own, and either some more
        die(f"{path}: cannot be read ({reason(error)})")


# ---- config.json -------------------------------------------------------------------------------


def model_config_of(config, folder):
    """config.json -> GPTConfig or LlamaConfig. What these models do not do is named, with exit
    status 2."""
    kind = config.get("model_type")
    if kind not in KINDS or "ForSequence" in str(config.get("architectures")):
        what, known = config.get("architectures") or kind, ", ".join(KINDS)
        die(f"{folder}: architecture {what}; what can be read are language models of type {known}")
    if "quantization_config" in config:
        die(f"{folder}: its weights are quantised; give a folder with them in 16 or 32 bits")
    config = UNSAID.get(kind, {}) | config
    family, read = (GPTConfig, read_gpt2) if kind == "gpt2" else (LlamaConfig, read_llama)
    try:
        for key, value in FIXED[family].items():
            expect(key, config.get(key, value), value)
        return read(config, {ours: config.get(key) for ours, key in table(SIZES[family]).items()})
    except (ValueError, TypeError, KeyError) as error:
        die(f"{folder}/config.json: {type(error).__name__}: {reason(error)}")


def table(pairs):
    """A line as those of SIZES -> {our name: theirs}."""
    names = [pair.partition("=") for pair in pairs.split()]
    return {ours: theirs or ours for ours, _, theirs in names}


def expect(key, value, *known):
    if value not in known:
        readable = " or ".join(map(repr, known))
        raise ValueError(f"{key} is {value!r}; what can be read has {readable}")


def checked(c):
    """The same config, if a model can be made of it; else raises ValueError."""
    for ours, key in table(SIZES[type(c)]).items():
        if type(n := getattr(c, ours)) is not int or not 0 < n < 2**24:
            raise ValueError(f"{key} is {n!r}, no number")
    numbers, remainder = [], c.d_model % c.n_head
    if isinstance(c, LlamaConfig):
        numbers, remainder = [c.norm_eps, c.rope_theta], c.n_head % c.n_kv_head + c.d_head % 2
        if scaling := c.rope_scaling:
            range_of = scaling["high_freq_factor"] - scaling["low_freq_factor"]
            numbers += [*scaling.values(), range_of]
    if remainder or not all(type(x) in (int, float) and 0 < x < 1e12 for x in numbers):
        raise ValueError(f"no sizes of a model: {c}")
    return c


def read_gpt2(config, sizes):
    gelu = config.get("activation_function", "gelu_new")
    expect("activation_function", gelu, *GELU)
    c = checked(GPTConfig(**sizes, gelu=GELU[gelu]))
    expect("n_inner", config.get("n_inner"), None, 4 * c.d_model)
    return c


def read_llama(config, sizes):
    """Qwen2 has a bias on queries, keys and values, Qwen3 a norm on queries and keys, SmolLM3 no
    positions in each fourth block. Within the window of its attention Mistral is a Llama."""
    kind = config["model_type"]
    # rope_parameters is what transformers 5 writes, rope_theta and rope_scaling what 4 did
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters is {rope!r}")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    expect("rope_type", rope_type, "default", "llama3")
    if kind == "mistral" and config.get("sliding_window"):
        sizes["block_size"] = min(sizes["block_size"] or 0, config["sliding_window"])
    sizes["n_kv_head"] = sizes["n_kv_head"] or sizes["n_head"]
    sizes["d_head"] = sizes["d_head"] or (sizes["d_model"] or 0) // (sizes["n_head"] or 1)
    c = LlamaConfig(
        **sizes,
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        rope_scaling={key: rope[key] for key in SCALING} if rope_type == "llama3" else None,
        nope_every=config.get("no_rope_layer_interval", 4) if kind == "smollm3" else 0,
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        is_tied=config.get("tie_word_embeddings", False),
    )
    n = checked(c).nope_every
    rotated = [int(not n or (i + 1) % n > 0) for i in range(c.n_layer)]
    expect("no_rope_layers", config.get("no_rope_layers"), None, rotated)
    return c


# ---- weights -----------------------------------------------------------------------------------


def turned(name, w):
    """A tensor as the other of the two keeps it: GPT-2's matrices are stored transposed."""
    return w.transpose(0, -1) if name.endswith(TRANSPOSED) else w


def parts_of(name, w, config):
    """{their name: tensor} of one of ours: several where they stand side by side in ours."""
    if not isinstance(config, LlamaConfig) or name == "lm_head.weight":
        return {name: w}
    layer, inner, kind = re.fullmatch(r"(h\.\d+\.)?(.+)\.(\w+)", name).groups("")
    outer, names = "model." + layer.replace("h.", "layers."), table(NAMES)[inner].split(",")
    q_k_v = [n * config.d_head for n in (config.n_head, config.n_kv_head, config.n_kv_head)]
    parts = w.split(q_k_v) if len(names) == 3 else w.chunk(len(names))
    return {f"{outer}{key}.{kind}": part for key, part in zip(names, parts)}


def convert(theirs, model_config, folder):
    """Their weights under our names and in our layout. The first tensor that is missing or has
    another shape than `model_config` wants is named, with exit status 2."""
    with torch.device("meta"):
        ours = model_config.build().state_dict()
    theirs = {n: turned(n, w) for n, w in theirs.items() if not n.endswith(BUFFERS)}
    theirs = {n.removeprefix("transformer."): w for n, w in theirs.items()}
    # where ours has no head of its own, it is the embedding: theirs may be stored a second time
    head = None if "lm_head.weight" in ours else theirs.pop("lm_head.weight", None)
    for name, w in ours.items():
        wanted = parts_of(name, w, model_config)
        for key, part in wanted.items():
            if key not in theirs:
                die(f"{folder}: tensor {key} is missing")
            shape, expected = tuple(theirs[key].shape), tuple(part.shape)
            if shape != expected:
                die(f"{folder}: tensor {name} has shape {shape}, expected {expected} ({key})")
        ours[name] = torch.cat([theirs.pop(key) for key in wanted])
    if theirs:
        die(f"{folder}: tensor {next(iter(theirs))} has no place in this architecture")
    if head is not None and not torch.equal(head, ours["wte.weight"]):
        die(f"{folder}: tensor lm_head.weight differs from wte.weight, to which it is tied")
    return ours
