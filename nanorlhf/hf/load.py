"""What --init takes: a checkpoint of ours, or a model of the GPT-2 or Llama family in Hugging Face
layout.

Behind the model's own tokens the vocabulary gets those of our special ones that it has none for,
each with a row of the embedding. tools/export.py writes a checkpoint in their layout.
"""

import json
from pathlib import Path

import torch

from nanorlhf.config import die
from nanorlhf.data.dialogue import TEMPLATES
from nanorlhf.hf.folder import checked, convert, download, model_config_of, read_json, read_weights
from nanorlhf.hf.tokenizer import own_template, read_tokenizer
from nanorlhf.llama import LlamaConfig, config_from, make_gpt
from nanorlhf.model import GPTConfig
from nanorlhf.run import checkpoint

KNOWN = {  # blocks, heads, width
    "distilgpt2": (6, 12, 768),
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


def load_gpt(init, dropout=0.0, template=""):
    """(GPT in float32, its Checkpoint without the weights) of what --init names: a checkpoint of
    ours, a folder in Hugging Face layout, one of KNOWN, or hf:owner/name. `template`: the chat
    template of such a model, by its name in dialogue.py; without it, the one that it brings."""
    if checkpoint.find(init) or not (is_name(init) or Path(init, "config.json").exists()):
        return checkpoint.load_gpt(init, dropout)
    found = read(init, template)
    found.model_config.dropout = dropout
    gpt = make_gpt(found.model_config)
    gpt.load_state_dict(found.weights)
    found.weights = {}  # the model has its own copy; this one would stay for the whole run
    return gpt, found


def model_sizes(init):
    """The GPTConfig of what --init names, without reading any weights or downloading anything."""
    if init in KNOWN:
        return GPTConfig(50260, 1024, *KNOWN[init])
    path = checkpoint.find(init)
    if path is None and Path(init, "config.json").exists():
        return model_config_of(read_json(Path(init, "config.json")), init)
    if path is None:
        die(f"--init {init}: no checkpoint there, and not one of {', '.join(KNOWN)}")
    try:
        return checked(config_from(json.loads((path / "config.json").read_text())["model"]))
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        die(f"{path}: not a whole checkpoint ({type(error).__name__}: {error})")


def is_name(init):
    return str(init) in KNOWN or str(init).startswith("hf:")


def load_gpt2(name_or_folder):
    """A GPT-2 in float32: by name, which huggingface_hub downloads, or from a folder with
    config.json and the weights in model.safetensors or pytorch_model.bin, sharded or not."""
    return load_gpt(name_or_folder)[0]


def read(init, template=""):
    """A language model in Hugging Face layout, as a Checkpoint."""
    is_folder = Path(init, "config.json").exists()
    folder = Path(init) if is_folder else download(str(init).removeprefix("hf:"))
    config = read_json(folder / "config.json")
    stage, kind, chat = what_it_is(config, folder)
    if kind != "lm":
        die(f"{folder}: {checkpoint.KINDS[kind]}; this needs {checkpoint.KINDS['lm']}")
    model_config = model_config_of(config, folder)
    style, system = "nanorlhf", ""
    if is_llama := isinstance(model_config, LlamaConfig):
        own = (template, "") if template else own_template(folder)
        if own == ("", ""):
            known = " or ".join(TEMPLATES)
            die(f"{folder}: its chat template is not known here; --template {known} decides")
        style, system = own or (style, system)
        chat = own is not None
    eos_id = config.get("eos_token_id")
    tokenizer = read_tokenizer(folder, config["vocab_size"], is_llama, eos_id, style, system)
    weights = convert(read_weights(folder), model_config, folder)
    for name in weights.keys() & {"wte.weight", "lm_head.weight"}:
        w = weights[name]  # (their vocabulary, width)
        # a new token starts at the mean of all tokens, and so about as likely as an average one
        n_new = max(tokenizer.vocab_size - len(w), 0)
        w = torch.cat([w, w.mean(0, keepdim=True).expand(n_new, -1)])
        weights[name] = w[: tokenizer.vocab_size].clone()  # theirs may be the larger one
    model_config.vocab_size = tokenizer.vocab_size
    return checkpoint.Checkpoint(
        Path(init), stage, kind, chat, 0, weights, tokenizer, model_config, {}
    )


def what_it_is(config, folder):
    """(stage, kind, chat) of a config.json. tools/export.py writes them into it; a model without
    them is a base model."""
    prefix = "nanorlhf_"
    ours = {k.removeprefix(prefix): v for k, v in config.items() if k.startswith(prefix)}
    try:
        return checkpoint.what_it_is({"stage": "gpt"} | ours)
    except ValueError as error:
        die(f"{folder}/config.json: {error}")
