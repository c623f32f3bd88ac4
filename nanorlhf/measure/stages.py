"""The stages' scripts as modules: what is timed and rehearsed are their own functions."""

import importlib.util
from pathlib import Path

from nanorlhf.config import die

ROOT = Path(__file__).parents[2]


def load_stage(name):
    """train_NAME.py of this clone, loaded anew: whoever changes its functions, to time them, has
    a copy of its own."""
    path = ROOT / f"train_{name}.py"
    if not path.is_file():
        die(f"{path}: not there; this needs a clone of the repository")
    spec = importlib.util.spec_from_file_location(f"stage_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
