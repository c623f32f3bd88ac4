"""Judgements of the SFT model's samples."""

from pathlib import Path
from types import SimpleNamespace

import train_rm
from nanorlhf import feedback
from nanorlhf.config import TrainConfig
from nanorlhf.data.examples import write_records
from nanorlhf.run import checkpoint
from nanorlhf.sources import feedback_of
from nanorlhf.tokenizer import byte_tokenizer
from tests.helpers import refused
from tests.run.test_checkpoint import train
from tests.test_engine import make_gpt


def test_feedback_is_not_collected_from_a_base_model(tmp_path, capsys):
    folder = train(tmp_path, make_gpt(), "my_gpt", chat=False)
    cfg = TrainConfig(out_dir=str(tmp_path / "rm"))
    cfg.sft = str(folder)
    said = refused(capsys, feedback.collect_feedback, cfg, checkpoint.load(folder))
    assert "a base model" in said and "--sft" in said and not Path(cfg.out_dir).exists()


def judged(folder, labeler):
    pairs = [
        {"prompt": str(i), "chosen": "a", "rejected": "b", "labeler": labeler} for i in range(60)
    ]
    return write_records(folder / "a.jsonl", pairs)


INIT = SimpleNamespace(tokenizer=byte_tokenizer(), model_config=SimpleNamespace(block_size=64))


def test_nothing_left_to_train_on_is_one_line(tmp_path, capsys):
    data = [judged(tmp_path, "heldout_7")]
    error = refused(capsys, feedback_of, train_rm.Config(data=data), INIT)
    assert "0 judgements to train on" in error and "--heldout_labelers" in error


def test_an_empty_name_holds_nobody_out(tmp_path):
    cfg = train_rm.Config(data=[judged(tmp_path, "heldout_7")], heldout_labelers="")
    _, _, train, val, unseen = feedback_of(cfg, INIT)
    assert len(train.rows) + len(val.rows) == 60 and len(val.rows) > 0 and unseen.rows == []


def test_one_judged_text_has_no_spread_and_is_refused(tmp_path, capsys):
    one = write_records(tmp_path / "b.jsonl", [{"prompt": "q", "completion": "a", "label": True}])
    error = refused(capsys, feedback_of, train_rm.Config(data=[one], val_data=[one]), INIT)
    assert "too few: 1 judgements" in error
