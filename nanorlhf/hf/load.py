"""A model of the GPT-2 or Llama family in Hugging Face layout, as a checkpoint of ours.

Behind the model's own tokens the vocabulary gets those of our special ones that it has none for,
each with a row of the embedding. hf/export.py writes a checkpoint in their layout.
"""

from pathlib import Path

import torch

from nanorlhf.config import die
from nanorlhf.data.dialogue import TEMPLATES
from nanorlhf.hf.folder import convert, download, model_config_of, read_json, read_weights
from nanorlhf.hf.tokenizer import own_template, read_tokenizer
from nanorlhf.llama import LlamaConfig, make_gpt
from nanorlhf.run import checkpoint


def load_foreign(init, dropout=0.0, template=""):
    """(GPT in float32, its Checkpoint without the weights), see loading.py."""
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
    model_config.vocab_size, model_config.dropout = tokenizer.vocab_size, dropout
    gpt = make_gpt(model_config)
    gpt.load_state_dict(weights)
    return gpt, checkpoint.Checkpoint(
        Path(init), stage, kind, chat, 0, {}, tokenizer, model_config, {}
    )


def what_it_is(config, folder):
    """(stage, kind, chat) of a config.json. hf/export.py writes them into it; a model without
    them is a base model."""
    prefix = "nanorlhf_"
    stage, kind, chat = (config.get(prefix + name) for name in ("stage", "kind", "chat"))
    if kind not in (None, *checkpoint.KINDS):
        die(f"{folder}/config.json: kind {kind!r}")
    return stage or "gpt", kind or "lm", bool(chat)
