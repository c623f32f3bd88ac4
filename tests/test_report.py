"""The report of a reward model, and the scale of its scores."""

from pathlib import Path

import torch

from nanorlhf import report
from nanorlhf.config import TrainConfig
from nanorlhf.model import RewardModel
from nanorlhf.run import checkpoint
from tests.helpers import refused
from tests.run.test_checkpoint import save
from tests.test_engine import make_config, make_gpt


def test_the_score_scale_is_written_into_the_checkpoint_whole_or_not_at_all(
    tmp_path, monkeypatch, capsys
):
    cfg = make_config(tmp_path)
    save(cfg, 1, RewardModel(make_gpt()), stage="rm")
    path = Path(cfg.out_dir, "step_1")
    report.set_score_scale(path, 0.5, 2.0)
    model, _ = checkpoint.load_reward_model(cfg.out_dir)
    assert (model.score_mean.item(), model.score_sd.item()) == (0.5, 2.0)
    monkeypatch.setattr(torch, "save", lambda *a: (_ for _ in ()).throw(OSError(28, "full")))
    assert "could not be written" in refused(capsys, report.set_score_scale, path, 9.0, 9.0)
    model, _ = checkpoint.load_reward_model(cfg.out_dir)
    assert model.score_sd.item() == 2.0


def test_a_reward_model_that_diverged_at_its_last_step_is_refused(capsys):
    scores = [[0.1, float("nan")]]
    said = refused(capsys, report.make_report, TrainConfig(), "comparisons", [], scores, [], [])
    assert "not finite" in said
