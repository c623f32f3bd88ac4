"""For the whole suite: one hypothesis profile, so the same examples on every machine."""

import pytest
import torch
from hypothesis import settings

from nanorlhf import config

settings.register_profile("nanorlhf", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("nanorlhf")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def nothing_was_said():
    """What a process says once, every test may say."""
    config.once.cache_clear()
