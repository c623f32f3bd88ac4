"""One hypothesis profile for the whole suite: the same examples on every machine."""

import torch
from hypothesis import settings

settings.register_profile("nanorlhf", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("nanorlhf")
torch.set_num_threads(1)
