"""A folder that looks like a fresh clone, for commands as a reader types them."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clone(tmp_path):
    """Links to what the project's root holds; out/ and all else that is written stays here."""
    for name in ("nanorlhf", "tests", "examples", "experiments", "docs", "Makefile"):
        (tmp_path / name).symlink_to(ROOT / name)
    for script in ROOT.glob("train_*.py"):
        (tmp_path / script.name).symlink_to(script)
    return tmp_path
