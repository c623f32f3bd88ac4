"""What --init takes: a checkpoint of ours; or a model of the GPT-2 or Llama family in Hugging Face
layout, whose reader, the room hf/, is imported only when it is asked for."""

from pathlib import Path

from nanorlhf.run import checkpoint

GPT2_NAMES = ("distilgpt2", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def load_gpt(init, dropout=0.0, template=""):
    """(GPT in float32, its Checkpoint without the weights) of a language model: a checkpoint of
    ours, a folder in Hugging Face layout, one of GPT2_NAMES, or hf:owner/name. `template`: the chat
    template of such a model, by its name in dialogue.py; without it, the one that it brings."""
    if not is_foreign(init):
        return checkpoint.load_gpt(init, dropout)
    from nanorlhf.hf.load import load_foreign

    return load_foreign(init, dropout, template)


def load_model(init, template=""):
    """As `load_gpt`, and of a reward model's checkpoint (RewardModel, its Checkpoint)."""
    return load_gpt(init, 0.0, template) if is_foreign(init) else checkpoint.load_model(init)


def is_foreign(init):
    """Whether --init names another project's model, and not a checkpoint of ours."""
    is_name = str(init) in GPT2_NAMES or str(init).startswith("hf:")
    return not checkpoint.find(init) and (is_name or Path(init, "config.json").exists())
