"""A run that is interrupted loses nothing, and one that would go on as another says so.

tests/sweeps/accidents.py does the same to all four stages in processes of their own.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanorlhf.course import mistakes
from nanorlhf.run import checkpoint
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
        accidents.end_by_signal(stage, cfg, step=5)
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


@pytest.mark.slow
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


# ---- what has changed since --------------------------------------------------------------------


def test_a_flag_that_has_changed_is_named_and_the_run_goes_on(half, capsys):
    cfg = half("ppo")
    capsys.readouterr()
    resume("ppo", replace(cfg, kl_coef=0.5, ppo_epochs=3, check=True))
    (warning,) = [x for x in capsys.readouterr().err.splitlines() if "goes on with" in x]
    assert "--kl_coef was 0.05, is 0.5" in warning and "--ppo_epochs was 2, is 3" in warning
    assert "check" not in warning and "resume" not in warning
    assert checkpoint.load(cfg.out_dir, prefer="latest").step == 8


@pytest.mark.parametrize(
    "stage, began, then, said",
    [
        ("sft", "eos_unlearned", "", "begun with --mistake eos_unlearned; resume it so"),
        (
            "sft",
            "eos_unlearned",
            "prompts_in_the_loss",
            "begun with --mistake eos_unlearned; resume it so",
        ),
        ("sft", "", "eos_unlearned", "begun without --mistake; resume it so"),
        ("ppo", "hunt", "", "begun with --mistake hunt --seed 3; resume it so"),
        ("sft", "eos_unlearned", "eos_unlearned", ""),
        ("ppo", "hunt", "hunt", ""),
    ],
)
def test_a_broken_run_goes_on_broken_and_a_healthy_one_healthy(
    half, monkeypatch, capsys, stage, began, then, said
):
    monkeypatch.setattr(mistakes, "PATCH", monkeypatch)
    cfg = half(stage, seed=3, mistake=began)
    kept = checkpoint.config_of(cfg.out_dir)["flags"]["mistake"]
    if said:
        assert said in refused(capsys, stage, replace(cfg, mistake=then))
        assert checkpoint.find(cfg.out_dir, "latest").name == "step_5"
        return
    resume(stage, replace(cfg, mistake=then))
    assert checkpoint.load(cfg.out_dir, prefer="latest").step == 8
    assert checkpoint.config_of(cfg.out_dir)["flags"]["mistake"] == kept != ""


def test_a_hunt_with_another_seed_is_another(half, monkeypatch, capsys):
    monkeypatch.setattr(mistakes, "PATCH", monkeypatch)
    cfg = half("ppo", seed=3, mistake="hunt")
    error = refused(capsys, "ppo", replace(cfg, mistake="hunt", seed=4))
    assert "begun with --mistake hunt --seed 3; resume it so" in error


@pytest.mark.parametrize(
    "stage, flag, name",
    [
        ("gpt", "data", "text.txt"),
        ("sft", "data", "demonstrations.jsonl"),
        ("sft", "init", "gpt"),
        ("rm", "data", "feedback.jsonl"),
        ("ppo", "init", "sft"),
        ("ppo", "reward", "reward.py"),
    ],
)
def test_a_changed_file_refuses_and_is_named_and_put_back_it_goes_on(
    half, whole, tmp_path, capsys, stage, flag, name
):
    start, path = Path(whole["gpt"].out_dir).parent, tmp_path / name
    if name == "text.txt":
        path.write_text("\n<|endoftext|>\n".join(f"{i} is a number" * 9 for i in range(300)))
    elif flag == "init":
        path = Path(shutil.copytree(start / name, tmp_path / "model"))
    else:
        shutil.copy(next(start.rglob(name)), path)
    value = {"data": [str(path)], "init": str(path), "reward": f"{path}:reward"}[flag]
    cfg = half(stage, **{flag: value})
    path = checkpoint.find(path) / "weights.pt" if flag == "init" else path
    before = path.read_bytes()
    if flag == "init":
        torch.save({k: w * 1.001 for k, w in torch.load(path, weights_only=True).items()}, path)
    else:
        more = b"# another judge" if flag == "reward" else before.splitlines()[-1]
        path.write_bytes(before.rstrip() + b"\n" + more + b"\n")
    error = refused(capsys, stage, cfg)
    assert "other contents" in error and (name if flag == "data" else f"--{flag}") in error
    path.write_bytes(before)
    resume(stage, cfg)
    assert checkpoint.load(cfg.out_dir, prefer="latest").step == 8


def test_a_damaged_state_is_named_and_the_best_checkpoint_told(half, whole, capsys):
    cfg = half("sft")
    assert Path(cfg.out_dir, "best").read_text() == "step_4"
    Path(cfg.out_dir, "step_5", "state.pt").write_bytes(b"half")
    error = refused(capsys, "sft", cfg)
    assert "step_5: not a whole checkpoint" in error and "to use step_4, write that into" in error
    Path(cfg.out_dir, "latest").write_text("step_4")
    resume("sft", cfg)
    assert "resumed at step 4" in capsys.readouterr().out
    assert not accidents.differs(Path(whole["sft"].out_dir), Path(cfg.out_dir))
