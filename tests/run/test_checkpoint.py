"""checkpoint.py: a checkpoint is whole or it is not there. What it is good for is its kind and
whether it chats, not which script made it; so a fork's is worth as much as a stage's."""

import contextlib
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from nanorlhf import engine, functional
from nanorlhf.config import TrainConfig
from nanorlhf.loading import load_gpt
from nanorlhf.machine import durable
from nanorlhf.model import ActorCritic, RewardModel
from nanorlhf.run import checkpoint
from nanorlhf.tokenizer import train_bpe
from tests.helpers import refused
from tests.test_engine import (
    SIZES,
    TOKENIZER,
    interrupt_at,
    loss_fn,
    make_config,
    make_gpt,
    run,
    step_folders,
)

torch.set_num_threads(1)
ROWS = torch.arange(48).view(4, 12) + 60
BATCH = {"tokens": ROWS, "weight": torch.ones(4), "source": ["here"] * 4}


class Policy(nn.Module):
    """What a fork may train: the language model, and beside it whatever else it needs."""

    def __init__(self, gpt, judge=None):
        super().__init__()
        self.gpt, self.judge = gpt, judge


class MyRewardModel(RewardModel):
    """A fork's own."""


def train(folder, model, stage, **flags):
    """A stage or a fork that trains a model by engine.train for a step; returns its folder."""
    plain = {"device": "cpu", "dtype": "float32", "max_steps": 1, "batch_size": 4}
    cfg = TrainConfig(out_dir=str(folder / stage), check=False, **plain, **flags.pop("cfg", {}))

    def loss_fn(model, batch):
        tokens = batch["tokens"]
        if isinstance(model, RewardModel):
            return model(tokens).square().mean(), {}
        logits = getattr(model, "gpt", model)(tokens[:, :-1])
        return functional.lm_loss(logits, tokens[:, 1:], torch.ones(4, 11, dtype=torch.bool)), {}

    engine.claim(cfg)
    next_batch = lambda step: BATCH
    engine.train(stage, cfg, model, loss_fn, next_batch, [BATCH], TOKENIZER, 1, **flags)
    return folder / stage


def rewrite(folder, **changes):
    """Change keys of config.json; None takes a key away."""
    path = checkpoint.find(folder) / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    durable.seal(path.parent)


# ---- kinds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [Policy, ActorCritic])
def test_a_fork_that_wraps_the_language_model_makes_a_checkpoint_that_loads(tmp_path, wrap):
    gpt = make_gpt()
    folder = train(tmp_path, wrap(gpt), "rloo")
    for load in (load_gpt, checkpoint.load_gpt):  # --init of every stage is the first of them
        found, about = load(folder)
        assert (about.stage, about.kind, about.chat) == ("rloo", "lm", True)
        assert all(torch.equal(a, b) for a, b in zip(gpt.parameters(), found.parameters()))


def test_a_reward_model_beside_the_policy_does_not_make_it_one(tmp_path):
    gpt, judge = make_gpt(), RewardModel(make_gpt(1)).requires_grad_(False)
    for stage, model in (("a", Policy(gpt, judge)), ("b", ActorCritic(gpt, RewardModel(gpt)))):
        found, about = load_gpt(train(tmp_path, model, stage))
        assert about.kind == "lm"
        assert all(torch.equal(a, b) for a, b in zip(gpt.parameters(), found.parameters()))


@pytest.mark.parametrize("model", [RewardModel, MyRewardModel])
def test_a_forks_reward_model_is_one_whatever_its_stage_is_called(tmp_path, model):
    folder = train(tmp_path, model(make_gpt()), "judge")
    _, about = checkpoint.load_reward_model(folder)
    assert (about.stage, about.kind, about.chat) == ("judge", "reward", True)


def test_a_checkpoint_of_the_other_kind_is_refused_in_words(tmp_path, capsys):
    lm, rm = train(tmp_path, make_gpt(), "one"), train(tmp_path, RewardModel(make_gpt()), "two")
    for load in (load_gpt, checkpoint.load_gpt):
        said = refused(capsys, load, rm)
        assert said == f"error: {rm}/step_1: a reward model; this needs a language model"
    said = refused(capsys, checkpoint.load_reward_model, lm)
    assert said == f"error: {lm}/step_1: a language model; this needs a reward model"
    assert [checkpoint.load(x).kind for x in (lm, rm)] == ["lm", "reward"]  # where any will do


def test_a_checkpoint_from_before_kinds_still_loads_as_what_its_stage_was(tmp_path):
    models = {"gpt": make_gpt(), "sft": make_gpt(), "rm": RewardModel(make_gpt())}
    models["ppo"] = ActorCritic(make_gpt())
    for stage, model in models.items():
        folder = train(tmp_path, model, stage)
        rewrite(folder, kind=None, chat=None)
        load = checkpoint.load_reward_model if stage == "rm" else load_gpt
        _, about = load(folder)
        assert (about.stage, about.chat) == (stage, stage != "gpt")
        assert about.kind == ("reward" if stage == "rm" else "lm")


def test_a_base_model_says_so(tmp_path):
    folder = train(tmp_path, make_gpt(), "my_gpt", chat=False)
    assert not load_gpt(folder)[1].chat
    assert json.loads((folder / "step_1/config.json").read_text())["chat"] is False


@pytest.mark.parametrize("key, value", [("kind", "rm"), ("kind", []), ("chat", "no"), ("stage", 1)])
def test_words_that_mean_nothing_are_damage(tmp_path, capsys, key, value):
    folder = train(tmp_path, make_gpt(), "sft")
    rewrite(folder, **{key: value})
    said = refused(capsys, load_gpt, folder)
    assert "not a whole checkpoint" in said and repr(value) in said


def test_a_missing_checkpoint_is_said_with_the_script_that_makes_one(tmp_path, capsys):
    for stage in ("gpt", "sft", "ppo"):
        said = refused(capsys, load_gpt, tmp_path / stage)
        assert said.endswith(f"{stage}: no checkpoint there; train_{stage}.py makes one")
    said = refused(capsys, checkpoint.load_reward_model, tmp_path / "mine")
    assert said.endswith("mine: no checkpoint there; train_rm.py makes one")
    said = refused(capsys, load_gpt, tmp_path / "mine")
    assert said.endswith("there; train_gpt.py or train_sft.py or train_ppo.py makes one")


def test_another_stages_run_is_not_resumed(tmp_path, capsys):
    folder = train(tmp_path, make_gpt(), "rloo")
    again = {"cfg": {"resume": True}}
    train(tmp_path, make_gpt(), "rloo", **again)
    rewrite(folder, stage="grpo")
    said = refused(capsys, train, tmp_path, make_gpt(), "rloo", **again)
    assert said.endswith("/rloo/step_1: a checkpoint of stage grpo; this is stage rloo")


# ---- whole or not there ------------------------------------------------------------------------


def save(cfg, step, gpt=None, first=False, best=False, stage="gpt", tokenizer=TOKENIZER):
    weights = (gpt or make_gpt(step)).state_dict()
    Path(cfg.out_dir).mkdir(exist_ok=True)
    checkpoint.save(cfg, stage, step, weights, {"x": step}, tokenizer, SIZES, first, best)


def test_weights_that_a_model_has_taken_are_not_kept_a_second_time(tmp_path):
    cfg = make_config(tmp_path)
    save(cfg, 1, RewardModel(make_gpt()), stage="rm")
    assert checkpoint.load_reward_model(cfg.out_dir)[1].weights == {}
    save(cfg, 2, ActorCritic(make_gpt()), stage="ppo")
    assert checkpoint.load_gpt(cfg.out_dir)[1].weights == {}


def test_a_saved_model_loads_as_it_was(tmp_path):
    cfg, gpt = make_config(tmp_path), make_gpt()
    save(cfg, 3, gpt, best=True)
    for folder in (cfg.out_dir, Path(cfg.out_dir, "step_3")):
        found, about = checkpoint.load_gpt(folder)
        assert (about.stage, about.step, about.model_config) == ("gpt", 3, SIZES)
        assert about.tokenizer == TOKENIZER and about.config["flags"]["max_steps"] == 8
        assert all(torch.equal(a, b) for a, b in zip(gpt.parameters(), found.parameters()))
    names = {p.name for p in Path(cfg.out_dir, "step_3").iterdir()}
    assert names == {"weights.pt", "state.pt", "tokenizer.json", "config.json", "SHA256SUMS"}


def test_latest_and_best_point_where_they_say_and_others_are_removed(tmp_path):
    cfg = make_config(tmp_path)
    for step, best in ((1, True), (2, True), (3, False), (4, False)):
        save(cfg, step, best=best)
    assert step_folders(cfg) == ["step_2", "step_4"]
    assert checkpoint.find(cfg.out_dir).name == "step_2"
    assert checkpoint.find(cfg.out_dir, "latest").name == "step_4"
    save(cfg, 5, best=True)
    assert step_folders(cfg) == ["step_5"]
    assert checkpoint.find(tmp_path / "nowhere") is None


def test_without_a_best_the_latest_is_found(tmp_path):
    cfg = make_config(tmp_path)
    save(cfg, 1, first=True)
    save(cfg, 2)
    assert checkpoint.find(cfg.out_dir).name == "step_2"


def test_best_is_the_checkpoint_with_the_lowest_validation_loss(tmp_path):
    losses = iter([5.0, 3.0, 4.0, 3.5])  # at steps 0, 2, 4, 6
    cfg = make_config(tmp_path, max_steps=6, eval_every=2, save_every=2)

    def staged(model, batch):
        loss, metrics = loss_fn(model, batch)
        return (loss, metrics) if model.training else (loss * 0 + next(losses), metrics)

    run(cfg, loss_fn=staged)
    assert step_folders(cfg) == ["step_2", "step_6"]
    assert checkpoint.find(cfg.out_dir, "best").name == "step_2"


def test_a_new_run_keeps_the_old_checkpoint_until_its_first_save(tmp_path, capsys):
    cfg = make_config(tmp_path)
    run(cfg)
    old = checkpoint.load(cfg.out_dir, "lm", "latest")
    capsys.readouterr()
    with pytest.raises(KeyboardInterrupt):
        run(cfg, interrupt_at(3), seed=5)
    assert "holds an earlier run" in capsys.readouterr().out
    kept = checkpoint.load(cfg.out_dir, "lm", "latest")
    assert kept.step == 8 and torch.equal(kept.weights["wte.weight"], old.weights["wte.weight"])
    with pytest.raises(KeyboardInterrupt):
        run(cfg, interrupt_at(5), seed=5)
    assert step_folders(cfg) == ["step_4"]  # its own first one: nothing of the old run is left
    assert checkpoint.load(cfg.out_dir, "lm").step == 4


def test_a_new_run_without_a_best_of_its_own_drops_the_old_best(tmp_path):
    cfg = make_config(tmp_path)
    save(cfg, 7, best=True)
    save(cfg, 1, first=True)
    assert checkpoint.find(cfg.out_dir).name == "step_1" and step_folders(cfg) == ["step_1"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("disk\nx")])
@pytest.mark.parametrize("step", [8, 4])
def test_a_save_that_fails_keeps_the_previous_checkpoint(
    tmp_path, monkeypatch, capsys, error, step
):
    cfg = make_config(tmp_path)
    save(cfg, 4, best=True)
    wanted = make_gpt(4).state_dict()

    def full_disk(x, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", full_disk)
    said = refused(capsys, save, cfg, step, make_gpt(8), best=True)
    assert f"step_{step}" in said and "could not be written" in said
    assert "last good checkpoint is kept" in said
    found = checkpoint.load(cfg.out_dir, "lm")
    assert found.step == 4 and step_folders(cfg) == ["step_4"]
    assert all(torch.equal(w, found.weights[name]) for name, w in wanted.items())


def test_a_save_that_was_killed_half_way_is_never_found(tmp_path):
    cfg = make_config(tmp_path)
    save(cfg, 4)
    Path(cfg.out_dir, ".step_8.partial").mkdir()
    Path(cfg.out_dir, ".step_8.partial", "weights.pt").write_bytes(b"half")
    assert checkpoint.load(cfg.out_dir, "lm").step == 4
    save(cfg, 12)
    assert step_folders(cfg) == ["step_12"]


@pytest.mark.parametrize("step", [4, 8])
@pytest.mark.parametrize("done", range(4))
def test_a_save_killed_between_any_two_of_its_moves_leaves_a_whole_checkpoint(
    tmp_path, monkeypatch, step, done
):
    cfg, moves = make_config(tmp_path), []
    save(cfg, 4, make_gpt(4), best=True)

    def until_killed(move):
        def moved(*args):
            if len(moves) == done:
                raise KeyboardInterrupt
            moves.append(args)
            return move(*args)

        return moved

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", until_killed(Path.rename))
        patch.setattr(os, "replace", until_killed(os.replace))
        with contextlib.suppress(KeyboardInterrupt):
            save(cfg, step, make_gpt(8), best=True)
    for prefer in ("latest", "best"):
        found = checkpoint.load(cfg.out_dir, "lm", prefer).weights
        assert any(
            all(torch.equal(w, found[name]) for name, w in make_gpt(seed).state_dict().items())
            for seed in (4, 8)
        )
    save(cfg, 12, best=True)
    assert step_folders(cfg) == ["step_12"]


def test_a_checkpoint_that_cannot_be_used_exits_2_with_its_reason(tmp_path, capsys):
    cfg = make_config(tmp_path)
    assert "no checkpoint there" in refused(capsys, checkpoint.load, cfg.out_dir)
    save(cfg, 1)
    folder = Path(cfg.out_dir, "step_1")
    (folder / "SHA256SUMS").unlink()  # which would tell first
    whole = (folder / "weights.pt").read_bytes()
    for broken in (b"", b"half", whole[: len(whole) // 2]):
        (folder / "weights.pt").write_bytes(broken)
        said = refused(capsys, checkpoint.load_gpt, cfg.out_dir)
        assert "step_1" in said and "not a whole" in said
    (folder / "weights.pt").write_bytes(whole)
    for name in ("config.json", "tokenizer.json"):
        text = (folder / name).read_text()
        for broken in ("{", "{}", "[]"):
            (folder / name).write_text(broken)
            said = refused(capsys, checkpoint.load_gpt, cfg.out_dir)
            assert "step_1" in said and "not a whole" in said
        (folder / name).write_text(text)
    (folder / "weights.pt").unlink()
    said = refused(capsys, checkpoint.load_gpt, cfg.out_dir)
    assert "step_1" in said and "not a whole" in said


@pytest.mark.parametrize("name", ["weights.pt", "config.json", "tokenizer.json"])
def test_one_flipped_bit_or_a_missing_file_is_noticed_and_named(tmp_path, capsys, name):
    cfg = make_config(tmp_path)
    save(cfg, 1)
    path = Path(cfg.out_dir, "step_1", name)
    whole = bytearray(path.read_bytes())
    for place in (0, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        flipped = whole.copy()
        flipped[place] ^= 4
        path.write_bytes(flipped)
        said = refused(capsys, checkpoint.load_gpt, cfg.out_dir)
        assert "step_1" in said and f"{name} is damaged" in said
    path.unlink()
    said = refused(capsys, checkpoint.load_gpt, cfg.out_dir)
    assert "step_1" in said and f"{name} is missing" in said
    path.write_bytes(whole)
    checkpoint.load_gpt(cfg.out_dir)


def test_weights_that_do_not_fit_exit_2_and_name_the_tensor(tmp_path, capsys):
    weights = make_gpt().state_dict()
    cases = {
        "ln_f.bias": {k: w for k, w in weights.items() if k != "ln_f.bias"},
        "wpe.weight": weights | {"wpe.weight": torch.zeros(3, 3)},
        "lm_head.weight": weights | {"lm_head.weight": torch.zeros(3, 3)},
    }
    for name, broken in cases.items():
        assert name in refused(capsys, checkpoint.restore, make_gpt(), broken, tmp_path)


def test_another_vocabulary_exits_2(tmp_path, capsys):
    cfg = make_config(tmp_path)
    other = train_bpe(["hello hello"] * 9, 262)
    save(cfg, 1, tokenizer=other)
    said = refused(capsys, checkpoint.load_gpt, cfg.out_dir)
    assert "tokenizer of 262" in said and f"model of {SIZES.vocab_size}" in said
    save(cfg, 2)
    cfg.resume = True
    assert "another tokenizer" in refused(capsys, run, cfg, tokenizer=other)
    a = checkpoint.load(cfg.out_dir, "lm")
    checkpoint.same_vocabulary(a, a)
    b = checkpoint.Checkpoint(Path("other"), "sft", "lm", True, 1, {}, other, SIZES, {})
    said = refused(capsys, checkpoint.same_vocabulary, a, b)
    assert "other" in said and "different vocabularies" in said


def test_resuming_another_stage_exits_2(tmp_path, capsys):
    cfg = make_config(tmp_path, resume=True)
    save(cfg, 1, stage="sft")
    assert "stage sft" in refused(capsys, run, cfg)
