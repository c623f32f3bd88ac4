"""checkpoint.py: a checkpoint is whole or it is not there. What it is good for is its kind and
whether it chats, not which script made it; so a fork's is worth as much as a stage's."""

import contextlib
import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from nanorlhf import engine, functional
from nanorlhf.bpe import train_bpe
from nanorlhf.config import TrainConfig
from nanorlhf.loading import load_gpt
from nanorlhf.model import ActorCritic, RewardModel
from nanorlhf.run import checkpoint
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


# ---- kinds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [Policy, ActorCritic])
def test_a_fork_that_wraps_the_language_model_makes_a_checkpoint_that_loads(tmp_path, wrap):
    gpt = make_gpt()
    folder = train(tmp_path, wrap(gpt), "rloo")
    loaded, saved = load_gpt(folder)
    assert (saved.stage, saved.kind, saved.tokenizer.chat) == ("rloo", "lm", True)
    assert all(torch.equal(a, b) for a, b in zip(gpt.parameters(), loaded.parameters()))
    assert saved.weights == {}  # the model has taken them, and they are not kept twice


def test_a_reward_model_beside_the_policy_does_not_make_it_one(tmp_path):
    gpt, judge = make_gpt(), RewardModel(make_gpt(1)).requires_grad_(False)
    for stage, model in (("a", Policy(gpt, judge)), ("b", ActorCritic(gpt, RewardModel(gpt)))):
        loaded, saved = load_gpt(train(tmp_path, model, stage))
        assert saved.kind == "lm"
        assert all(torch.equal(a, b) for a, b in zip(gpt.parameters(), loaded.parameters()))


def test_a_forks_reward_model_is_one_whatever_its_stage_is_called(tmp_path):
    folder = train(tmp_path, RewardModel(make_gpt()), "judge")
    _, saved = checkpoint.load_model(folder, "reward")
    assert (saved.stage, saved.kind, saved.tokenizer.chat) == ("judge", "reward", True)
    assert saved.weights == {}


def test_a_checkpoint_of_the_other_kind_is_refused_in_words(tmp_path, capsys):
    lm, rm = train(tmp_path, make_gpt(), "one"), train(tmp_path, RewardModel(make_gpt()), "two")
    error = refused(capsys, load_gpt, rm)
    assert error == f"error: {rm}/step_1: a reward model; this needs a language model"
    error = refused(capsys, checkpoint.load_model, lm, "reward")
    assert error == f"error: {lm}/step_1: a language model; this needs a reward model"
    assert [checkpoint.load(x).kind for x in (lm, rm)] == ["lm", "reward"]  # where any will do


def test_a_base_model_says_so_and_a_checkpoint_of_an_early_format_too(tmp_path, capsys):
    folder = train(tmp_path, make_gpt(), "my_gpt", details={"chat": False})
    assert not load_gpt(folder)[1].tokenizer.chat
    rewrite(folder, kind=None, chat=None)
    assert "step_1: of an early format" in refused(capsys, load_gpt, folder)
    rewrite(folder, kind="rm", chat=True)
    assert "not a whole checkpoint (KeyError: 'rm')" in refused(capsys, load_gpt, folder)


def test_a_gelu_that_there_is_not_is_refused_where_the_checkpoint_is_read(tmp_path, capsys):
    folder = train(tmp_path, make_gpt(), "one")
    sizes = json.loads((folder / "step_1/config.json").read_text())["model"]
    rewrite(folder, model=sizes | {"gelu": "1"})
    said = "one/step_1: not a whole checkpoint (AssertionError: gelu: '1')"
    assert said in refused(capsys, load_gpt, folder)


def test_a_missing_checkpoint_is_said_with_the_script_that_makes_one(tmp_path, capsys):
    for stage in ("gpt", "sft", "ppo"):
        error = refused(capsys, load_gpt, tmp_path / stage)
        assert error.endswith(f"{stage}: no checkpoint there; train_{stage}.py makes one")
    error = refused(capsys, checkpoint.load_model, tmp_path / "mine", "reward")
    assert error.endswith("mine: no checkpoint there; train_rm.py makes one")
    error = refused(capsys, load_gpt, tmp_path / "mine")
    assert error.endswith("mine: no checkpoint there; train_{gpt,sft,ppo}.py makes one")


def test_another_stages_run_is_not_resumed(tmp_path, capsys):
    folder = train(tmp_path, make_gpt(), "rloo")
    again = {"cfg": {"resume": True}}
    train(tmp_path, make_gpt(), "rloo", **again)
    rewrite(folder, stage="grpo")
    error = refused(capsys, train, tmp_path, make_gpt(), "rloo", **again)
    assert error.endswith("/rloo/step_1: a checkpoint of stage grpo; this is stage rloo")


# ---- whole or not there ------------------------------------------------------------------------


def save(cfg, step, gpt=None, best=0, stage="gpt", tokenizer=TOKENIZER):
    weights = (gpt or make_gpt(step)).state_dict()
    Path(cfg.out_dir).mkdir(exist_ok=True)
    checkpoint.save(cfg, stage, step, weights, {"x": step}, tokenizer, SIZES, best)


def is_model(weights, seed):
    return all(torch.equal(w, weights[name]) for name, w in make_gpt(seed).state_dict().items())


def test_a_saved_model_loads_as_it_was(tmp_path):
    cfg, gpt = make_config(tmp_path), make_gpt()
    save(cfg, 3, gpt, best=3)
    for folder in (cfg.out_dir, Path(cfg.out_dir, "step_3")):
        loaded, saved = checkpoint.load_model(folder, "lm")
        assert (saved.stage, saved.step, saved.model_config) == ("gpt", 3, SIZES)
        assert saved.tokenizer == TOKENIZER and saved.config["flags"]["max_steps"] == 8
        assert all(torch.equal(a, b) for a, b in zip(gpt.parameters(), loaded.parameters()))
    names = {p.name for p in Path(cfg.out_dir, "step_3").iterdir()}
    assert names == {"weights.pt", "state.pt", "tokenizer.json", "config.json"}


def test_latest_and_best_point_where_they_say_and_others_are_removed(tmp_path):
    cfg = make_config(tmp_path)
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2)):
        save(cfg, step, best=best)
    assert step_folders(cfg) == ["step_2", "step_4"]
    assert checkpoint.find(cfg.out_dir).name == "step_2"
    assert checkpoint.find(cfg.out_dir, "latest").name == "step_4"
    save(cfg, 5, best=5)
    assert step_folders(cfg) == ["step_5"]
    save(cfg, 6)  # of a stage that has no validation loss
    assert step_folders(cfg) == ["step_6"] and checkpoint.find(cfg.out_dir).name == "step_6"
    assert checkpoint.find(tmp_path / "nowhere") is None


def test_best_is_the_checkpoint_with_the_lowest_validation_loss(tmp_path):
    losses = iter([5.0, 3.0, 4.0, 3.5])  # at steps 0, 2, 4, 6
    cfg = make_config(tmp_path, max_steps=6, eval_every=2, save_every=2, check=False)

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
    for _ in range(2):  # a third run keeps it as well
        with pytest.raises(KeyboardInterrupt):
            run(cfg, interrupt_at(3), seed=5)
        assert "holds an earlier run" in capsys.readouterr().out
        kept = checkpoint.load(cfg.out_dir, "lm", "latest")
        assert kept.step == 8 and torch.equal(kept.weights["wte.weight"], old.weights["wte.weight"])
    with pytest.raises(KeyboardInterrupt):
        run(cfg, interrupt_at(5), seed=5)
    assert step_folders(cfg) == ["step_4"]  # its own first one: nothing of the old run is left
    assert checkpoint.load(cfg.out_dir, "lm").step == 4


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("disk\nx")])
def test_a_save_that_fails_keeps_the_previous_checkpoint(tmp_path, monkeypatch, capsys, error):
    cfg = make_config(tmp_path)
    save(cfg, 4, best=4)

    def full_disk(x, path):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", full_disk)
    message = refused(capsys, save, cfg, 8, best=8)
    assert "step_8: could not be written" in message
    assert "last good checkpoint is kept" in message
    found = checkpoint.load(cfg.out_dir, "lm")
    assert found.step == 4 and step_folders(cfg) == ["step_4"] and is_model(found.weights, 4)


class Killed(BaseException):
    """As by SIGKILL, after so many moves of files and folders."""


@contextlib.contextmanager
def killed_after(n):
    left = iter(range(n))

    def until(move):
        def moved(*args, **kwargs):
            if next(left, None) is None:
                raise Killed
            return move(*args, **kwargs)

        return moved

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", until(Path.rename))
        patch.setattr(os, "replace", until(os.replace))
        patch.setattr(checkpoint.shutil, "rmtree", until(checkpoint.shutil.rmtree))
        patch.setattr(Path, "unlink", until(Path.unlink))
        with contextlib.suppress(Killed):
            yield


@pytest.mark.parametrize("best", [4, 8])
@pytest.mark.parametrize("n", range(12))
def test_a_save_killed_between_any_two_of_its_moves_leaves_a_whole_checkpoint(tmp_path, best, n):
    cfg = make_config(tmp_path)
    save(cfg, 4, best=4)
    with killed_after(n):
        save(cfg, 8, best=best)
    for pointer in ("latest", "best"):
        found = checkpoint.load(cfg.out_dir, "lm", pointer)
        assert is_model(found.weights, found.step) and found.step in (4, best, 8)
    resumed_at = checkpoint.newest(cfg.out_dir)
    save(cfg, 8, best=8)
    assert step_folders(cfg) == ["step_8"] and resumed_at.name in ("step_4", "step_8")


@pytest.mark.parametrize("step", [2, 4, 8, 9])
@pytest.mark.parametrize("n", range(14))
def test_a_new_run_killed_anywhere_leaves_the_old_checkpoint_or_its_own(tmp_path, step, n):
    """The old ones are of steps 4, the best, and 8; the new run's first may be of the same step."""
    cfg = make_config(tmp_path)
    save(cfg, 4, best=4)
    save(cfg, 8, best=4)
    with killed_after(n):
        checkpoint.set_aside(Path(cfg.out_dir))
        save(cfg, step, make_gpt(99))
    path = checkpoint.newest(cfg.out_dir)
    for pointer in ("latest", "best"):
        found = checkpoint.load(cfg.out_dir, "lm", pointer)
        assert is_model(found.weights, 99) or is_model(found.weights, found.step)
    if n > 1 and path:  # it goes on as the new run, where that has saved, and starts anew if not
        assert is_model(checkpoint.load(path).weights, 99)
    checkpoint.set_aside(Path(cfg.out_dir))
    save(cfg, step, make_gpt(98))
    assert step_folders(cfg) == [f"step_{step}"]
    assert is_model(checkpoint.load(cfg.out_dir).weights, 98)


def test_a_checkpoint_that_cannot_be_read_exits_2_and_the_other_one_is_told(tmp_path, capsys):
    cfg = make_config(tmp_path)
    assert "no checkpoint there" in refused(capsys, checkpoint.load, cfg.out_dir)
    save(cfg, 1)
    folder = Path(cfg.out_dir, "step_1")
    whole = (folder / "weights.pt").read_bytes()
    broken = [("weights.pt", x) for x in (b"", b"half", whole[: len(whole) // 2])]
    broken += [(name, x) for name in ("config.json", "tokenizer.json") for x in (b"{", b"{}")]
    for name, contents in broken:
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(contents)
        error = refused(capsys, checkpoint.load_model, cfg.out_dir)
        assert "step_1: not a whole checkpoint" in error and "to use" not in error
        (folder / name).write_bytes(before)
    save(cfg, 2, best=1)
    (folder / "weights.pt").unlink()
    error = refused(capsys, checkpoint.load_model, cfg.out_dir)
    assert error.endswith(f"; to use step_2, write that into {cfg.out_dir}/latest or best")
    Path(cfg.out_dir, "best").write_text("step_2")
    assert checkpoint.load_model(cfg.out_dir, "lm")[1].step == 2


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
    error = refused(capsys, checkpoint.load_model, cfg.out_dir)
    assert "tokenizer of 262" in error and f"model of {SIZES.vocab_size}" in error
    save(cfg, 2)
    cfg.resume = True
    assert "another tokenizer" in refused(capsys, run, cfg, tokenizer=other)
    a = checkpoint.load(cfg.out_dir, "lm")
    checkpoint.same_vocabulary(a, a)
    b = checkpoint.Checkpoint(Path("other"), "sft", "lm", 1, {}, other, SIZES, {})
    error = refused(capsys, checkpoint.same_vocabulary, a, b)
    assert "other" in error and "different vocabularies" in error


@pytest.mark.parametrize("name", ["weights.pt", "state.pt"])
def test_a_flipped_bit_is_noticed(tmp_path, capsys, name):
    """torch.load would read it: a file of torch.save has checksums, and nobody compares them."""
    cfg = make_config(tmp_path)
    run(cfg)
    path = checkpoint.find(cfg.out_dir, "latest") / name
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        largest = max(file.infolist(), key=lambda info: info.file_size)
    data[largest.header_offset + 200 + largest.file_size // 2] ^= 1
    path.write_bytes(bytes(data))
    cfg.resume = True
    assert "not what was written" in refused(capsys, run, cfg)


def test_a_users_own_folder_beside_the_steps_stays(tmp_path):
    cfg = make_config(tmp_path)
    mine = Path(cfg.out_dir, "notes_of_step_4")
    mine.mkdir(parents=True)
    run(cfg)
    assert mine.is_dir()
