"""Judgements of the SFT model's samples."""

from pathlib import Path

import train_rm
from nanorlhf import feedback
from nanorlhf.run import checkpoint
from tests.helpers import refused
from tests.run.test_checkpoint import train
from tests.test_engine import make_gpt


def test_feedback_is_not_collected_from_a_base_model(tmp_path, capsys):
    folder = train(tmp_path, make_gpt(), "my_gpt", details={"chat": False})
    cfg = train_rm.Config(out_dir=str(tmp_path / "rm"), sft=str(folder))
    said = refused(capsys, feedback.collect_feedback, cfg, checkpoint.load(folder))
    assert "a base model" in said and "--sft" in said and not Path(cfg.out_dir).exists()
