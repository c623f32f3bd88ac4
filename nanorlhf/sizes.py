"""The sizes of a model that --init names, for the commands that predict and measure."""

import json
from pathlib import Path

from nanorlhf.config import die
from nanorlhf.hf.folder import checked, model_config_of, read_json
from nanorlhf.llama import config_from
from nanorlhf.loading import GPT2_SIZES, is_foreign
from nanorlhf.model import GPTConfig
from nanorlhf.run import checkpoint


def model_sizes(init):
    """The GPTConfig of what --init names. Reads no weights and downloads nothing."""
    if init in GPT2_SIZES:
        return GPTConfig(50260, 1024, *GPT2_SIZES[init])
    if is_foreign(init):
        return model_config_of(read_json(Path(init, "config.json")), init)
    path = checkpoint.find(init)
    if path is None:
        die(f"--init {init}: no checkpoint there, and not one of {', '.join(GPT2_SIZES)}")
    try:
        return checked(config_from(json.loads((path / "config.json").read_text())["model"]))
    except (OSError, ValueError, LookupError, TypeError) as error:
        checkpoint.die_of_damage(path, error)
