"""What --init takes: a checkpoint of ours; or a model of the GPT-2 or Llama family in Hugging Face
layout, whose reader, the room hf/, is imported only when it is asked for."""

import json
from pathlib import Path

from nanorlhf.config import die, doing
from nanorlhf.model import GPTConfig
from nanorlhf.run import checkpoint

GPT2_SIZES = {  # blocks, heads, width
    "distilgpt2": (6, 12, 768),
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


def load_gpt(init, dropout=0.0, template="", kind="lm"):
    """(GPT in float32, its Checkpoint without the weights) of a language model: a checkpoint of
    ours, a folder in Hugging Face layout, one of GPT2_SIZES, or hf:owner/name. `template`: the chat
    template of such a model, as --template says; without it, the one that it brings. A checkpoint
    of ours must be of the `kind`, and keeps its own template."""
    if not is_foreign(init):
        model, saved = checkpoint.load_model(init, kind, dropout)
        if not saved.tokenizer.has_template(template):
            die(f"--template {template}: {saved.path} keeps the template that it was made with")
        return model, saved
    from nanorlhf.hf.load import load_foreign

    doing(f"loading {init}")
    gpt, stage, tokenizer = load_foreign(init, dropout, template)
    own = checkpoint.Checkpoint(Path(init), stage, "lm", 0, {}, tokenizer, gpt.config, {})
    return gpt, own


def load_model(init, template=""):
    """As `load_gpt`, and of a reward model's checkpoint (RewardModel, its Checkpoint)."""
    return load_gpt(init, template=template, kind=None)


def is_foreign(init):
    """Whether --init names another project's model, and not a checkpoint of ours."""
    is_name = str(init) in GPT2_SIZES or str(init).startswith("hf:")
    return not checkpoint.find(init) and (is_name or Path(init, "config.json").exists())


def model_sizes(init):
    """The GPTConfig of what --init names, for the commands that predict and measure. Reads no
    weights and downloads nothing."""
    from nanorlhf.hf.folder import checked, model_config_of, read_json

    if init in GPT2_SIZES:
        return GPTConfig(50260, 1024, *GPT2_SIZES[init])
    if is_foreign(init):
        return model_config_of(read_json(Path(init, "config.json")), init)
    path = checkpoint.find(init)
    if path is None:
        die(f"--init {init}: no checkpoint there, and not one of {', '.join(GPT2_SIZES)}")
    try:
        config = json.loads((path / "config.json").read_text())
        return checked(checkpoint.config_from(config["model"]))
    except (OSError, ValueError, LookupError, TypeError) as error:
        checkpoint.die_of_damage(path, error)


def ancestors(saved):
    """Yields config.json of the checkpoint, of the one it started from, and so on as far back as
    they still exist."""
    config, path, seen = saved.config, saved.path, set()
    while path and path.parent.resolve() not in seen:  # a fork may start from its own folder
        yield config
        seen.add(path.parent.resolve())
        path = checkpoint.find(config.get("flags", {}).get("init") or "nowhere")
        config = json.loads((path / "config.json").read_text()) if path else {}
