"""A model to talk to and to count tokens for."""

import pytest
import torch

from nanorlhf.config import TrainConfig
from nanorlhf.model import GPT, GPTConfig
from nanorlhf.run import checkpoint
from nanorlhf.tokenizer import byte_tokenizer

BYTES = byte_tokenizer()


@pytest.fixture
def model(tmp_path):
    """A folder with a small SFT checkpoint, context 48."""
    torch.manual_seed(1)
    config = GPTConfig(BYTES.vocab_size, 48, 1, 2, 16)
    cfg = TrainConfig(out_dir=str(tmp_path / "sft"))
    weights = GPT(config).state_dict()
    (tmp_path / "sft").mkdir()
    checkpoint.save(cfg, "sft", 1, weights, {}, BYTES, config)
    return cfg.out_dir
