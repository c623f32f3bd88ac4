"""Weights that the field uses: GPT-2 in Hugging Face layout; tools/export.py writes it.

Their matrices are stored transposed (Conv1D) and their names have a prefix; the architecture is
the one of model.py. The vocabulary gets rows for our special tokens behind GPT-2's own.
"""

from pathlib import Path

import torch

from nanorlhf import checkpoint
from nanorlhf.config import die
from nanorlhf.formats.hf_folder import download, read_json, read_weights
from nanorlhf.formats.hf_tokenizer import read_tokenizer
from nanorlhf.model import GPT, GPTConfig

KNOWN = {  # blocks, heads, width
    "distilgpt2": (6, 12, 768), "gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600),
}  # fmt: skip
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# what GPT is and cannot be told to be otherwise; absent keys have these values
FIXED = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
         "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}  # fmt: skip


def load_gpt(init, stages=("gpt", "sft", "ppo"), dropout=0.0):
    """--init: (GPT in float32, Checkpoint) of a checkpoint of ours, a folder in Hugging Face
    layout, one of KNOWN, or hf:owner/name."""
    if checkpoint.find(init) or not (is_name(init) or Path(init, "config.json").exists()):
        return checkpoint.load_gpt(init, stages, dropout)
    found = read(init)
    if found.stage not in stages:
        die(f"{init}: a model of stage {found.stage}; this needs {' or '.join(stages)}")
    found.model_config.dropout = dropout
    gpt = GPT(found.model_config)
    gpt.load_state_dict(found.weights)
    found.weights = {}  # they are in the model; a second copy would stay for the whole run
    return gpt, found


def is_name(init):
    return str(init) in KNOWN or str(init).startswith("hf:")


def load_gpt2(name_or_folder):
    """GPT in float32 with the weights of GPT-2: by name (huggingface_hub downloads it), or from a
    folder with config.json, model.safetensors or pytorch_model.bin, sharded or not."""
    return load_gpt(name_or_folder)[0]


def read(init):
    """A Checkpoint made of a model in Hugging Face layout."""
    is_folder = Path(init, "config.json").exists()
    folder = Path(init) if is_folder else download(str(init).removeprefix("hf:"))
    config = read_json(folder / "config.json")
    model_config = sizes(config, folder)
    tokenizer = read_tokenizer(folder, config["vocab_size"])
    weights = convert(read_weights(folder), model_config, folder)
    wte = weights["wte.weight"]
    missing = tokenizer.vocab_size - len(wte)
    # a new token starts at the mean of all: it gets the probability of an average one
    weights["wte.weight"] = torch.cat([wte, wte.mean(0, keepdim=True).expand(max(missing, 0), -1)])
    weights["wte.weight"] = weights["wte.weight"][: tokenizer.vocab_size].clone()
    model_config.vocab_size = tokenizer.vocab_size
    stage = config.get("nanorlhf_stage", "gpt")
    return checkpoint.Checkpoint(Path(init), stage, 0, weights, tokenizer, model_config, {})


def sizes(config, folder):
    """config.json -> GPTConfig; whatever our GPT-2 does not do exits 2."""
    if config.get("model_type") != "gpt2" or "ForSequence" in str(config.get("architectures")):
        about = config.get("architectures") or config.get("model_type")
        die(f"{folder}: architecture {about}; only language models of type gpt2 can be read")
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            die(f"{folder}: {key} is {config[key]!r}, not {value!r}: not GPT-2's architecture")
    try:
        names = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
        found = GPTConfig(*(int(config[name]) for name in names))
    except (KeyError, TypeError, ValueError) as error:
        die(f"{folder}/config.json: {error} is missing or no number")
    if config.get("n_inner") not in (None, 4 * found.d_model):
        die(f"{folder}: n_inner is {config['n_inner']}, not 4 times n_embd")
    return found


def convert(found, config, folder):
    """Their names and layout -> ours; the first tensor that is missing or wrong is named."""
    found = {name.removeprefix("transformer."): w for name, w in found.items()}
    buffers = [name for name in found if name.endswith((".attn.bias", ".attn.masked_bias"))]
    found = {name: w for name, w in found.items() if name not in buffers}
    head = found.pop("lm_head.weight", found.get("wte.weight"))
    weights = {}
    with torch.device("meta"):
        shapes = {name: tuple(w.shape) for name, w in GPT(config).state_dict().items()}
    for name, shape in shapes.items():
        stored = shape[::-1] if name.endswith(TRANSPOSED) else shape
        w = found.pop(name, None)
        if w is None or tuple(w.shape) != stored:
            what = "is missing" if w is None else f"has shape {tuple(w.shape)}, expected {stored}"
            die(f"{folder}: tensor {name} {what}")
        weights[name] = w.T.contiguous() if name.endswith(TRANSPOSED) else w
    if found:
        die(f"{folder}: tensor {next(iter(found))} has no place in GPT-2")
    if not torch.equal(head, weights["wte.weight"]):
        die(f"{folder}: tensor lm_head.weight differs from wte.weight; GPT-2's are tied")
    return weights
