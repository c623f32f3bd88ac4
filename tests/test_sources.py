"""What each stage is given, of the user's files and of the embedded world."""

from types import SimpleNamespace

import pytest

import train_ppo
import train_rm
import train_sft
from nanorlhf import sources
from nanorlhf.data.batches import feedback_batch
from nanorlhf.data.files import write_records
from nanorlhf.model import GPT, GPTConfig, RewardModel
from nanorlhf.sources import feedback_of
from nanorlhf.tokenizer import byte_tokenizer
from tests.helpers import refused

BYTES = byte_tokenizer()


def start(block_size):
    """What --init names, to be sampled from: a tokenizer and a context."""
    return SimpleNamespace(tokenizer=BYTES, model_config=SimpleNamespace(block_size=block_size))


INIT = start(64)


def pairs(folder, name, prompts, **more):
    records = [{"prompt": p, "chosen": "a", "rejected": "b"} | more for p in prompts]
    return write_records(folder / name, records)


def test_what_evaluates_is_drawn_from_the_whole_file(tmp_path):
    """A published file may be sorted. So are these, and their first rows are all alike."""
    data = [pairs(tmp_path, "train.jsonl", ["x", "y"])]
    val = [pairs(tmp_path, "val.jsonl", ["first"] * 90 + [f"later {i}" for i in range(910)])]
    flags = {"data": data, "val_data": val, "out_dir": str(tmp_path)}
    _, _, sft = sources.demonstrations_of(train_sft.Config(**flags, val_examples=20))
    _, _, _, rm, _ = feedback_of(train_rm.Config(**flags, val_examples=20), INIT)
    _, ppo = sources.ppo_prompts(train_ppo.Config(**flags, eval_prompts=20), start(256))
    for found in ([e.first_turn for e in sft], [e.first_turn for e in rm.examples]):
        assert len(found) == 20 and len(set(found)) > 15
    assert len({p.text for p in ppo}) == 20


def test_held_out_prompts_without_prompts_are_refused(tmp_path, capsys):
    """The world's gold, which would judge them, knows nothing of them."""
    val = [pairs(tmp_path, "val.jsonl", ["a", "b"])]
    said = refused(capsys, sources.ppo_prompts, train_ppo.Config(val_data=val), start(256))
    assert f"--val_data {val[0]}: without --data" in said


def test_ppo_asks_no_prompt_twice_in_an_epoch_and_counts_them(tmp_path, capsys):
    data = [pairs(tmp_path, "a.jsonl", ["one"] * 50 + [f"p {i}" for i in range(30)])]
    cfg = train_ppo.Config(data=data, out_dir=str(tmp_path), batch_size=8, eval_prompts=2)
    train, val = sources.ppo_prompts(cfg, start(256))
    said = capsys.readouterr().out
    assert "49 of 80 prompts are repetitions" in said
    assert f"[ppo] {len(train)} prompts to train on, {len(val)} held out" in said
    assert len({p.text for p in [*train, *val]}) == len(train) + len(val) and len(val) == 2
    asked = [sources.prompts_of_step(train, cfg, step) for step in range(9)]
    assert {len(batch) for batch in asked} == {8}  # the last of an epoch as well
    flat = [p.text for batch in asked for p in batch]
    assert sorted(flat[: len(train)]) == sorted(p.text for p in train)


def test_the_worlds_prompts_are_asked_once(tmp_path):
    cfg = train_ppo.Config(out_dir=str(tmp_path), max_steps=8)
    train, val = sources.ppo_prompts(cfg, start(512))
    assert len({p.text for p in train}) == len(train) > 0.98 * 8 * 128
    assert len({p.text for p in val}) == len(val) == 128


def judged(folder, labeler):
    return pairs(folder, "a.jsonl", map(str, range(60)), labeler=labeler)


def test_nothing_left_to_train_on_is_one_line(tmp_path, capsys):
    data = [judged(tmp_path, "heldout_7")]
    error = refused(capsys, feedback_of, train_rm.Config(data=data), INIT)
    assert "0 judgements to train on" in error and "--heldout_labelers" in error


def test_a_name_is_that_labeler_and_those_of_its_panel(tmp_path, capsys):
    names = ["1", "12", "1_a", "1st"] * 30
    records = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(len(names))]
    records = [r | {"labeler": name} for r, name in zip(records, names)]
    data = [write_records(tmp_path / "a.jsonl", records)]
    _, _, train, val, unseen = feedback_of(train_rm.Config(data=data, heldout_labelers="1"), INIT)
    assert {e.labeler for e in train.examples + val.examples} == {"12", "1st"}
    assert {e.labeler for e in unseen.examples} <= {"1", "1_a"}
    n = 60 - len(unseen.examples)
    said = capsys.readouterr().out
    assert f"[rm] {n} judgements of training prompts, by --heldout_labelers, are left out" in said


def test_prompts_on_both_sides_are_said(tmp_path, capsys):
    data = [judged(tmp_path, "a")]
    feedback_of(train_rm.Config(data=data, val_data=data), INIT)
    assert "60 prompts of --val_data are in --data, too" in capsys.readouterr().err


def test_an_empty_name_holds_nobody_out(tmp_path):
    cfg = train_rm.Config(data=[judged(tmp_path, "heldout_7")], heldout_labelers="")
    _, _, train, val, unseen = feedback_of(cfg, INIT)
    assert len(train.rows) + len(val.rows) == 60 and len(val.rows) > 0 and unseen.rows == []


def test_one_judged_text_has_no_spread_and_is_refused(tmp_path, capsys):
    one, other = ({"prompt": q, "completion": "a", "label": True} for q in "qr")
    files = {"data": [write_records(tmp_path / "b.jsonl", [one])]}
    files["val_data"] = [write_records(tmp_path / "c.jsonl", [other])]
    error = refused(capsys, feedback_of, train_rm.Config(**files), INIT)
    assert "too few: 1 judgements" in error


ALIKE = {
    "ratings": {"completion": "a", "rating": 3.3},
    "thumbs": {"completion": "a", "label": True},
    "ties": {"completions": ["a", "b"], "ranks": [1, 1]},
}


@pytest.mark.parametrize("kind", ALIKE)
def test_judgements_that_are_all_alike_are_refused(tmp_path, capsys, kind):
    records = [{"prompt": str(i)} | ALIKE[kind] for i in range(60)]
    data = [write_records(tmp_path / "a.jsonl", records)]
    assert "are alike" in refused(capsys, feedback_of, train_rm.Config(data=data), INIT)


def test_what_label_wrote_and_published_pairs_are_one_kind(tmp_path):
    """They train one reward model, and so does a ranking of more."""
    said = {"completions": ["a", "b"], "ranks": [2, 1], "labeler": "ann", "models": ["m", "m"]}
    ours = [{"judgement_id": str(i), "prompt": f"o {i}"} | said for i in range(30)]
    ours[0] |= {"completions": ["a", "b", "c"], "ranks": [1, 3, 2]}
    data = [write_records(tmp_path / "ours.jsonl", ours)]
    data += [pairs(tmp_path, "theirs.jsonl", [f"t {i}" for i in range(30)])]
    cfg = train_rm.Config(data=data, out_dir=str(tmp_path))
    kind, _, train, val, _ = feedback_of(cfg, INIT)
    targets = sorted(e.target for e in train.examples + val.examples)
    assert kind == "rankings" and targets == [[1, 2]] * 30 + [[1, 3, 2]] + [[2, 1]] * 29
    model = RewardModel(GPT(GPTConfig(BYTES.vocab_size, 64, 1, 2, 16)))
    rows = feedback_batch(train.rows, range(len(train.rows)), BYTES.pad_id)
    loss, metrics = train_rm.feedback_loss(kind, 1, model, rows)
    loss.backward()
    assert loss.item() > 0 and 0 <= metrics["accuracy"] <= 1
