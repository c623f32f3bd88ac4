"""Weights that the field uses: GPT-2 in Hugging Face layout; tools/export.py writes it.

The vocabulary gets rows for our special tokens behind GPT-2's own.
"""

from pathlib import Path

import torch

from nanorlhf.config import die
from nanorlhf.hf.folder import convert, download, read_json, read_weights, sizes
from nanorlhf.hf.tokenizer import read_tokenizer
from nanorlhf.model import GPT
from nanorlhf.run import checkpoint

KNOWN = {  # blocks, heads, width
    "distilgpt2": (6, 12, 768),
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


def load_gpt(init, dropout=0.0):
    """--init: (GPT in float32, Checkpoint) of a checkpoint of ours, a folder in Hugging Face
    layout, one of KNOWN, or hf:owner/name."""
    if checkpoint.find(init) or not (is_name(init) or Path(init, "config.json").exists()):
        return checkpoint.load_gpt(init, dropout)
    found = read(init)
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
    """A Checkpoint made of a language model in Hugging Face layout."""
    is_folder = Path(init, "config.json").exists()
    folder = Path(init) if is_folder else download(str(init).removeprefix("hf:"))
    config = read_json(folder / "config.json")
    stage, kind, chat = what_it_is(config, folder)
    if kind != "lm":
        die(f"{folder}: {checkpoint.KINDS[kind]}; this needs {checkpoint.KINDS['lm']}")
    model_config = sizes(config, folder)
    tokenizer = read_tokenizer(folder, config["vocab_size"])
    weights = convert(read_weights(folder), model_config, folder)
    wte = weights["wte.weight"]
    missing = tokenizer.vocab_size - len(wte)
    # a new token starts at the mean of all: it gets the probability of an average one
    weights["wte.weight"] = torch.cat([wte, wte.mean(0, keepdim=True).expand(max(missing, 0), -1)])
    weights["wte.weight"] = weights["wte.weight"][: tokenizer.vocab_size].clone()
    model_config.vocab_size = tokenizer.vocab_size
    return checkpoint.Checkpoint(
        Path(init), stage, kind, chat, 0, weights, tokenizer, model_config, {}
    )


def what_it_is(config, folder):
    """(stage, kind, chat) of their config.json, which holds our words where the model is ours; any
    other is a base model."""
    prefix = "nanorlhf_"
    ours = {k.removeprefix(prefix): v for k, v in config.items() if k.startswith(prefix)}
    try:
        return checkpoint.what_it_is({"stage": "gpt"} | ours)
    except ValueError as error:
        die(f"{folder}/config.json: {error}")
