"""checkpoint.py: what a checkpoint is good for is its kind and whether it chats, not which script
made it; so a fork's is worth as much as a stage's."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from nanorlhf import engine, feedback, functional
from nanorlhf.config import TrainConfig
from nanorlhf.hf.load import load_gpt
from nanorlhf.machine import durable
from nanorlhf.model import GPT, ActorCritic, GPTConfig, RewardModel
from nanorlhf.run import checkpoint
from nanorlhf.tokenizer import byte_tokenizer

torch.set_num_threads(1)
TOKENIZER = byte_tokenizer()
SIZES = GPTConfig(TOKENIZER.vocab_size, block_size=24, n_layer=1, n_head=2, d_model=8)
ROWS = torch.arange(48).view(4, 12) + 60
BATCH = {"tokens": ROWS, "weight": torch.ones(4), "source": ["here"] * 4}


class Policy(nn.Module):
    """What a fork may train: the language model, and beside it whatever else it needs."""

    def __init__(self, gpt, judge=None):
        super().__init__()
        self.gpt, self.judge = gpt, judge


class MyRewardModel(RewardModel):
    """A fork's own."""


def make_gpt(seed=0):
    torch.manual_seed(seed)
    return GPT(SIZES)


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


def refused(capsys, function, *args, **kwargs):
    """The one line on stderr of what exits with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        function(*args, **kwargs)
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert stop.value.code == 2 and len(errors) == 1
    return errors[0]


def rewrite(folder, **changes):
    """Change keys of config.json; None takes a key away."""
    path = checkpoint.find(folder) / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    durable.seal(path.parent)


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


def test_feedback_is_not_collected_from_a_base_model(tmp_path, capsys):
    folder = train(tmp_path, make_gpt(), "my_gpt", chat=False)
    cfg = TrainConfig(out_dir=str(tmp_path / "rm"))
    cfg.sft = str(folder)
    said = refused(capsys, feedback.collect_feedback, cfg, checkpoint.load(folder))
    assert "a base model" in said and "--sft" in said and not Path(cfg.out_dir).exists()
