"""A run that is interrupted loses nothing, and one that would go on as another says so.

tests/sweeps/accidents.py does the same to all four stages in processes of their own.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nanorlhf.machine import durable, process
from nanorlhf.run import checkpoint, session
from tests.sweeps import accidents

torch.set_num_threads(1)  # toy products are no faster on two, and crawl on a busy machine


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The four stages, undisturbed, and their configurations."""
    folder = tmp_path_factory.mktemp("whole")
    configs = accidents.configs(folder, folder)
    for stage, cfg in configs.items():
        accidents.STAGES[stage].main(cfg)
    return configs


@pytest.fixture
def half(whole, tmp_path):
    """half(stage): the configuration of a run of that stage that a signal ended after step 5."""

    def make(stage, **flags):
        cfg = accidents.configs(Path(whole["gpt"].out_dir).parent, tmp_path)[stage]
        cfg = replace(cfg, **flags)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
            due = session.Run.due

            def signalled(self, step):
                if step == 5:
                    patch.setattr(process, "_heard", [(signal.SIGTERM, 0.0)])
                return due(self, step)

            patch.setattr(session.Run, "due", signalled)
            accidents.STAGES[stage].main(cfg)
        assert end.value.code == 128 + signal.SIGTERM
        return replace(cfg, resume=True)

    return make


def resume(stage, cfg):
    return accidents.STAGES[stage].main(cfg)


def refused(capsys, stage, cfg):
    """The one line with which a run refuses to go on."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        resume(stage, cfg)
    lines = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("warning")]
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.mark.parametrize("stage, flag", [("sft", "init"), ("rm", "sft"), ("ppo", "reward")])
@pytest.mark.parametrize("inside", [False, True], ids=["the folder", "a step in it"])
def test_no_model_is_read_from_the_folder_that_is_written_to(
    whole, tmp_path, capsys, stage, flag, inside
):
    """Its first save would remove what it started from."""
    start = whole["rm"].out_dir if flag == "reward" else getattr(whole[stage], flag)
    shutil.copytree(start, tmp_path / "here")
    before = {p: p.read_bytes() for p in (tmp_path / "here").rglob("*") if p.is_file()}
    model = checkpoint.find(tmp_path / "here") if inside else tmp_path / "here/"
    cfg = replace(whole[stage], out_dir=f"{tmp_path}/x/../here", **{flag: str(model)})
    assert f"--{flag} {model} is in --out_dir" in refused(capsys, stage, cfg)
    after = {p: p.read_bytes() for p in (tmp_path / "here").rglob("*") if p.is_file()}
    assert before == after
    (tmp_path / "judge.py").write_text("def f(prompts, responses): return [0.0] * len(responses)")
    if stage == "ppo":  # but for a function, which no save replaces
        cfg = replace(cfg, out_dir=str(tmp_path), reward=f"{tmp_path}/judge.py:f", max_steps=1)
        assert resume(stage, cfg)


def test_two_reward_models_under_one_parent_keep_their_own_feedback(half, whole, capsys):
    first = half("rm")
    kept = Path(first.out_dir, "feedback.jsonl").read_bytes()
    beside = replace(first, out_dir=f"{first.out_dir}_2", seed=9, resume=False)
    resume("rm", beside)
    assert Path(beside.out_dir, "feedback.jsonl").read_bytes() != kept
    resume("rm", first)
    assert "resumed at step 5" in capsys.readouterr().out
    assert Path(first.out_dir, "feedback.jsonl").read_bytes() == kept


@pytest.mark.parametrize("stage", accidents.STAGES)
def test_a_signal_saves_at_once_and_the_resumed_run_is_the_undisturbed_one(
    half, whole, capsys, stage
):
    cfg = half(stage)
    assert "--resume" in capsys.readouterr().out.splitlines()[-1]
    assert checkpoint.find(cfg.out_dir, "latest").name == "step_5"
    resume(stage, cfg)
    assert "resumed at step 5 from" in capsys.readouterr().out
    assert not accidents.differs(Path(whole[stage].out_dir), Path(cfg.out_dir))


def test_killed_runs_of_all_stages_go_on_as_if_nothing_had_happened():
    """In processes of their own, one SIGKILL a stage; `make accidents` has many more."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.sweeps.accidents", "4", "0"]
    done = subprocess.run(command, cwd=accidents.ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("1 kills: 0 complaints") == 4


def test_without_a_checkpoint_a_run_to_resume_says_so_and_starts_at_0(whole, tmp_path, capsys):
    start = Path(whole["gpt"].out_dir).parent
    cfg = replace(accidents.configs(start, tmp_path)["sft"], resume=True)
    resume("sft", cfg)
    assert "no checkpoint to resume, starts at step 0" in capsys.readouterr().out
    assert not accidents.differs(Path(whole["sft"].out_dir), Path(cfg.out_dir))


def test_a_new_run_killed_before_it_saved_does_not_go_on_as_the_one_before(half, capsys):
    """Nor is the earlier run's checkpoint lost before the new one has its own."""
    cfg = half("sft")
    Path(cfg.out_dir, ".begun").touch()  # what a new run leaves behind
    assert checkpoint.find(cfg.out_dir, "latest").name == "step_5"
    capsys.readouterr()
    resume("sft", cfg)
    assert "starts at step 0" in capsys.readouterr().out
    assert not Path(cfg.out_dir, ".begun").exists()


# ---- what has changed since --------------------------------------------------------------------


def test_other_flags_are_listed_and_need_resume_anyway(half, capsys):
    cfg = half("ppo")
    other = replace(cfg, kl_coef=0.5, ppo_epochs=3, keep=3, tensorboard=False)
    said = refused(capsys, "ppo", other)
    assert "--kl_coef was 0.05, is 0.5" in said and "--ppo_epochs was 2, is 3" in said
    assert "--resume_anyway" in said and "keep" not in said
    resume("ppo", replace(other, resume_anyway=True))
    assert "--kl_coef was 0.05, is 0.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    "stage, what",
    [
        ("gpt", "text"),
        ("sft", "demonstrations"),
        ("rm", "feedback"),
        ("ppo", "--init"),
        ("ppo", "--reward"),
    ],
)
def test_a_changed_file_refuses_and_is_named_and_put_back_it_goes_on(
    half, whole, tmp_path, capsys, stage, what
):
    """Not even --resume_anyway makes two runs one."""
    start = Path(whole["gpt"].out_dir).parent
    texts = tmp_path / "text.txt"
    texts.write_text("\n<|endoftext|>\n".join(f"{i} is a number" * 9 for i in range(300)))
    shutil.copytree(start / "sft", tmp_path / "reference")
    shutil.copy(start / "reward.py", tmp_path / "judge.py")
    flags, path = {
        "text": ({"data": [str(texts)]}, texts),
        "demonstrations": ({"data": [f"{start}/sft/demonstrations.jsonl"]}, None),
        "feedback": ({"data": [f"{start}/rm/feedback.jsonl"]}, None),
        "--init": ({"init": f"{tmp_path}/reference"}, None),
        "--reward": ({"reward": f"{tmp_path}/judge.py:reward"}, tmp_path / "judge.py"),
    }[what]
    if what == "--init":
        folder = checkpoint.find(tmp_path / "reference")
        path = folder / "weights.pt"
    elif path is None:
        path = Path(shutil.copy(flags["data"][0], tmp_path / "data.jsonl"))
        flags = {"data": [str(path)]}
    cfg = half(stage, **flags)
    before = path.read_bytes()
    if what == "--init":
        weights = torch.load(path, weights_only=True)
        torch.save({k: w * 1.001 for k, w in weights.items()}, path)
        durable.seal(folder)
    elif what == "--reward":
        path.write_bytes(before + b"\n# another judge\n")
    else:
        path.write_bytes(before + before.splitlines(keepends=True)[-1])
    for anyway in (False, True):
        said = refused(capsys, stage, replace(cfg, resume_anyway=anyway))
        assert "other contents" in said and (what if what[0] == "-" else path.name) in said
    path.write_bytes(before)
    if what == "--init":
        durable.seal(folder)
    resume(stage, cfg)
    assert checkpoint.load(cfg.out_dir, prefer="latest").step == 8


# ---- damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weights.pt", "state.pt", "config.json", "tokenizer.json"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(half, whole, capsys, name):
    cfg = half("sft", keep=2)
    assert sorted(p.name for p in checkpoint.all_of(Path(cfg.out_dir))) == ["step_4", "step_5"]
    path = Path(cfg.out_dir, "step_5", name)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    capsys.readouterr()
    resume("sft", cfg)
    said = capsys.readouterr()
    assert f"{name} is damaged" in said.err and "resumed at step 4" in said.out
    assert not accidents.differs(Path(whole["sft"].out_dir), Path(cfg.out_dir))


def test_where_every_checkpoint_is_damaged_nothing_is_overwritten(half, capsys):
    cfg = half("sft")
    for path in checkpoint.all_of(Path(cfg.out_dir)):
        (path / "weights.pt").write_bytes(b"half")
    assert "no whole checkpoint" in refused(capsys, "sft", cfg)
    assert Path(cfg.out_dir, "step_5", "weights.pt").read_bytes() == b"half"


def test_keep_bounds_the_checkpoints(half):
    """The newest N, and the best."""
    cfg = half("sft", keep=3)
    assert [p.name for p in checkpoint.all_of(Path(cfg.out_dir))] == ["step_5", "step_4", "step_2"]
    resume("sft", cfg)
    names = [p.name for p in checkpoint.all_of(Path(cfg.out_dir))]
    assert names[:3] == ["step_8", "step_6", "step_5"] and len(names) <= 4
    best = Path(cfg.out_dir, "best").read_text()
    assert set(names) == {"step_8", "step_6", "step_5", best}


# ---- the pieces --------------------------------------------------------------------------------


def test_random_states_come_back():
    draws = lambda: [
        random.random(),
        *np.random.rand(2),
        np.random.randn(),
        *torch.rand(2).tolist(),
    ]
    session.seed_all(3)
    np.random.randn()  # of a pair, the second is kept for the next call
    states = session.random_states()
    first = draws()
    assert draws() != first
    session.restore_random(states)
    assert draws() == first


def test_sha256sum_reads_what_is_written(whole):
    path = checkpoint.find(whole["gpt"].out_dir)
    if not shutil.which("sha256sum"):
        pytest.skip("no sha256sum here")
    done = subprocess.run(["sha256sum", "-c", durable.SUMS], cwd=path, capture_output=True)
    assert done.returncode == 0 and done.stdout.count(b": OK") == 4
