"""The stages' scripts as modules, so that `bench` and `memory` run the scripts' own functions."""

import importlib.util
from pathlib import Path

from nanorlhf.config import die

ROOT = Path(__file__).parents[2]


def load_stage(name):
    """The module train_NAME.py of this clone. Every call loads a new one, as `phase_clock` changes
    the functions in its own. Exits 2 where the package was installed without the scripts."""
    path = ROOT / f"train_{name}.py"
    if not path.is_file():
        die(f"{path}: not there; this needs a clone of the repository")
    spec = importlib.util.spec_from_file_location(f"stage_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
