"""--mistake: each changes the numbers of its stage, whatever loads the model says so, and a hunt
gives nothing away until it is asked to."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from experiments import mistakes as experiment
from experiments.lab import Lab
from nanorlhf import functional
from nanorlhf.course import mistakes
from nanorlhf.course.mistakes import MISTAKES, OF_STAGE
from nanorlhf.run import checkpoint
from tests.helpers import refused, words
from tests.run.test_selfcheck import SCRIPTS, checked_name, config, make_start, verdict
from tests.test_house import ROOT

NAMES = [(stage, m.__name__) for stage, some in OF_STAGE.items() for m in some]
EACH = pytest.mark.parametrize("stage, name", NAMES)


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    return make_start(tmp_path_factory.mktemp("mistakes"))


@pytest.fixture
def run(start, monkeypatch, tmp_path):
    """Runs a stage in this process; what a mistake replaces is put back after the test."""
    monkeypatch.setattr(mistakes, "PATCH", monkeypatch)

    def run(stage, name, **flags):
        out = str(tmp_path / (name or "healthy"))
        cfg = config(stage, start, out_dir=out, mistake=name, **flags)
        SCRIPTS[stage].main(cfg)
        return rows_of(out)

    return run


def rows_of(out):
    with open(f"{out}/metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_there_are_twelve():
    assert len(MISTAKES) == 12 and set(OF_STAGE) == set(SCRIPTS)


@EACH
def test_a_mistake_changes_the_numbers_and_says_what_it_is(run, capsys, stage, name):
    healthy, said = run(stage, ""), capsys.readouterr().out
    broken, words = run(stage, name), capsys.readouterr().out
    assert healthy != broken and list(healthy[0]) == list(broken[0])
    assert "checks:" in said and "broken on purpose" not in said
    assert "checks:" not in words and f"[{stage}] broken on purpose" in words
    assert MISTAKES[name].__doc__ in words
    assert "first and last numbers" in words and "the doctor: " in words


@EACH
def test_the_check_that_is_named_would_have_caught_it(start, monkeypatch, stage, name):
    MISTAKES[name](monkeypatch)
    said, named = verdict(stage, start), re.search(r"would say: (\w+)\.", MISTAKES[name].__doc__)
    assert (checked_name(said) if said else None) == (named and named[1])


@pytest.mark.parametrize("kind", ["rankings", "comparisons", "ratings", "thumbs"])
def test_labels_are_swapped_in_feedback_of_every_kind(run, start, kind):
    data = [str(start / f"{kind}.jsonl")]
    healthy, broken = (run("rm", name, data=data) for name in ("", "labels_swapped"))
    if kind == "ratings":  # which have no margin
        assert healthy[0]["val_loss"] != broken[0]["val_loss"]
        return
    assert healthy[0]["val_margin"] == broken[0]["val_margin"]
    assert float(healthy[-1]["val_margin"]) > float(broken[-1]["val_margin"])


def test_swapped_labels_turn_the_sign_of_every_score(monkeypatch):
    scores, target = torch.tensor([[0.3, -2.0, 1.0]]), torch.tensor([[2, 3, 1]])
    names = ("ranking_loss", "rating_loss", "thumbs_loss")
    losses = lambda x: [getattr(functional, name)(x, target.to(x.dtype)) for name in names]
    wanted = losses(-scores)
    mistakes.labels_swapped(monkeypatch)
    assert losses(scores) == wanted and losses(-scores) != wanted


@pytest.mark.parametrize(
    "name, flags, where",
    [
        ("late_values", {"critic": "none"}, "--critic is none"),
        ("late_values", {"vf_coef": 0.0}, "--critic is shared and --vf_coef is 0"),
        ("k3_in_the_reward", {"kl_coef": 0.0}, "--kl_coef is 0"),
        ("k3_in_the_reward", {"kl_coef": 0.0, "kl_loss_coef": 0.1}, "--kl_coef is 0"),
        ("k3_in_the_reward", {"max_steps": 1}, "--max_steps is 1"),
        ("k3_swapped", {"max_steps": 1}, "--max_steps is 1"),
        ("score_everywhere", {"max_new_tokens": 1}, "--max_new_tokens is 1"),
        ("k3_in_the_reward", {"learning_rate": 0.0}, "--learning_rate is 0"),
        ("k3_swapped", {"learning_rate": 0.0}, "--learning_rate is 0"),
        ("reference_moves", {"learning_rate": 0.0}, "--learning_rate is 0"),
    ],
)
def test_where_a_mistake_changes_no_number_it_is_refused(
    run, capsys, monkeypatch, name, flags, where
):
    healthy = run("ppo", "", **flags)
    error = refused(capsys, run, "ppo", name, **flags)
    assert error == f"error: --mistake {name} does nothing where {where}"
    monkeypatch.setattr(mistakes, "IDLE", ())
    assert run("ppo", name, **flags) == healthy


@pytest.mark.parametrize(
    "name, flags",
    [
        ("late_values", {"critic": "separate", "vf_coef": 0.0}),
        ("k3_in_the_reward", {"kl_loss_coef": 0.1}),
        ("reference_moves", {"freeze_layers": 2, "kl_coef": 0.0}),
        ("cold_samples", {"temperature": 0.5}),
    ],
)
def test_where_it_changes_some_it_is_not(run, name, flags):
    assert run("ppo", "", **flags) != run("ppo", name, **flags)


def test_a_fork_and_a_split_model_have_idle_mistakes_of_their_own(monkeypatch, capsys, start):
    from experiments import train_rloo

    monkeypatch.setattr(mistakes, "PATCH", monkeypatch)
    grpo = {"baseline": "grpo", "kl_coef": 0.0}
    for cfg, where in (
        (train_rloo.Config(mistake="late_values"), "--critic is none"),
        (train_rloo.Config(mistake="k3_in_the_reward", **grpo), "--baseline is grpo"),
        (config("ppo", start, mistake="reference_moves", shard=True), "--shard is True"),
    ):
        assert f"{cfg.mistake} does nothing where {where}" in refused(capsys, mistakes.make, cfg)


def command(stage, start, out, name):
    """The script as it is typed, with the flags of a tiny run."""
    cfg = config(stage, start, out_dir=str(out), mistake=name)
    line = [sys.executable, str(ROOT / f"train_{stage}.py"), *words(cfg)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return rows_of(out), done.stdout


def test_a_script_that_runs_is_broken_too(run, start, tmp_path):
    """It was read before its flags were, and its name is __main__."""
    healthy, (broken, said) = run("ppo", ""), command("ppo", start, tmp_path / "b", "k3_swapped")
    assert "broken on purpose" in said and "the doctor: " in said
    differs = [
        name for name in healthy[0] if [r[name] for r in healthy] != [r[name] for r in broken]
    ]
    assert differs == ["kl_k3"]


def test_a_broken_run_of_the_experiment_leaves_no_mistake_behind(run, start, tmp_path):
    cfg = config("ppo", start, out_dir=str(tmp_path / "b"), mistake="k3_swapped")
    good = functional.kl_estimate
    assert experiment.apart(cfg) == cfg.out_dir and functional.kl_estimate is good
    assert "broken on purpose" in (tmp_path / "b/printed.txt").read_text()
    assert run("ppo", "") != rows_of(cfg.out_dir)


@pytest.mark.slow
@EACH
def test_every_script_is_broken_by_every_mistake(run, start, tmp_path, stage, name):
    assert run(stage, "") != command(stage, start, tmp_path / "b", name)[0]


def test_what_loads_the_model_is_warned(run, capsys, tmp_path):
    run("sft", "eos_unlearned")
    saved = json.loads((checkpoint.find(tmp_path / "eos_unlearned") / "config.json").read_text())
    assert saved["flags"]["mistake"] == "eos_unlearned" and saved["flags"]["check"] is False
    capsys.readouterr()
    checkpoint.load_model(tmp_path / "eos_unlearned")
    assert "broken on purpose, by --mistake eos_unlearned" in capsys.readouterr().err


def test_a_hunt_gives_nothing_away_until_it_is_revealed(run, start, capsys, tmp_path):
    run("ppo", "hunt", seed=3)
    said = capsys.readouterr()
    config_json = (checkpoint.find(tmp_path / "hunt") / "config.json").read_text()
    listed = re.search(r"one of (.*); --mistake reveal", said.out)[1]
    assert listed.split(", ") == [m.__name__ for m in OF_STAGE["ppo"]]
    rest = said.out.replace(listed, "") + said.err + config_json
    assert not [name for name in MISTAKES if name in rest or MISTAKES[name].__doc__ in rest]
    with pytest.raises(SystemExit) as end:
        mistakes.make(config("ppo", start, out_dir=str(tmp_path / "hunt"), mistake="reveal"))
    said = capsys.readouterr().out
    assert end.value.code == 0 and sum(f": {name}, " in said for name in MISTAKES) == 1


@pytest.mark.parametrize(
    "flags, idle",
    [({}, set()), ({"kl_coef": 0.0, "critic": "none"}, {"k3_in_the_reward", "late_values"})],
)
def test_hunts_find_every_mistake_and_one_seed_the_same(monkeypatch, start, capsys, flags, idle):
    monkeypatch.setattr(mistakes, "PATCH", SimpleNamespace(setattr=lambda *args: None))
    kept = {}
    for seed in [*range(40), *range(40)]:
        cfg = config("ppo", start, mistake="hunt", seed=seed, **flags)
        mistakes.make(cfg)
        assert kept.setdefault(seed, cfg.mistake) == cfg.mistake
    found = {n for s, k in kept.items() for n in MISTAKES if mistakes.encoded(n, s) == k}
    assert found == {m.__name__ for m in OF_STAGE["ppo"]} - idle
    said = capsys.readouterr().out
    assert not any(name in said for name in idle) and all(name in said for name in found)


def test_a_hunt_for_the_only_one_says_so(run, capsys):
    run("gpt", "hunt")
    assert "not checked: future_seen, the only one of this stage\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["hunt", "eos_unlearned"])
def test_a_fork_that_begins_before_its_stage_does_is_broken_once(
    monkeypatch, start, capsys, tmp_path, name
):
    from experiments import train_rft

    monkeypatch.setattr(mistakes, "PATCH", monkeypatch)
    (tmp_path / "judge.py").write_text("def f(prompts, responses): return [0.0] * len(prompts)")
    flags = {"max_steps": 2, "eval_every": 9, "save_every": 9, "max_new_tokens": 14, "best_of": 2}
    flags |= {"device": "cpu", "init": str(start / "sft"), "data": [str(start / "prompts.jsonl")]}
    cfg = train_rft.Config(
        f"{tmp_path}/rft", mistake=name, reward=f"{tmp_path}/judge.py:f", **flags
    )
    train_rft.main(cfg)
    said, path = capsys.readouterr().out, checkpoint.find(cfg.out_dir) / "config.json"
    assert said.count("broken on purpose") == said.count("first and last numbers") == 1
    assert json.loads(path.read_text())["flags"]["mistake"] == cfg.mistake


def test_a_script_without_mistakes_says_so(capsys):
    from experiments import train_dpo

    for name in ("hunt", "labels_swapped"):
        error = refused(capsys, mistakes.make, train_dpo.Config(mistake=name))
        assert error == f"error: --mistake {name}: this script has none to switch on"


def test_list_and_reveal_run_nothing(start, capsys, tmp_path):
    for stage in SCRIPTS:
        with pytest.raises(SystemExit) as end:
            SCRIPTS[stage].main(config(stage, start, out_dir=str(tmp_path / "a"), mistake="list"))
        assert end.value.code == 0
        said = capsys.readouterr().out
        assert all(name in said for name in MISTAKES)
    with pytest.raises(SystemExit) as end:
        SCRIPTS["ppo"].main(config("ppo", start, out_dir=str(tmp_path / "a"), mistake="reveal"))
    assert end.value.code == 2 and "no checkpoint of a run with" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_a_name_that_is_none_and_one_of_another_stage_are_refused(start, capsys):
    for name in ("k4", "eos_unlearned"):
        with pytest.raises(SystemExit) as end:
            SCRIPTS["ppo"].main(config("ppo", start, mistake=name))
        assert end.value.code == 2 and "k3_swapped" in capsys.readouterr().err


def test_a_fork_has_the_mistakes_of_its_stage():
    from experiments import train_dpo, train_rloo

    assert mistakes.stage_of(train_rloo.Config()) == "ppo"
    assert mistakes.stage_of(train_dpo.Config()) == ""


def test_a_healthy_run_imports_nothing_of_the_course():
    code = "import sys, train_ppo; assert not [m for m in sys.modules if '.course' in m]"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    "stage, wanted",
    [
        ("gpt", [("gpt", "x", "", "")]),
        ("sft", [("sft", "x", "gpt", ""), ("ppo", "", "t/1_x/sft", "rm")]),
        ("rm", [("rm", "x", "sft", ""), ("ppo", "", "sft", "t/1_x/rm")]),
        ("ppo", [("ppo", "x", "sft", "rm")]),
    ],
)
def test_the_experiment_breaks_one_stage_and_lets_ppo_follow(monkeypatch, stage, wanted):
    runs = []

    def apart(cfg):
        runs.append((Path(cfg.out_dir).name, cfg.mistake, getattr(cfg, "init", "")))
        runs[-1] += tuple(getattr(cfg, "reward", [""]))
        return cfg.out_dir

    monkeypatch.setattr(experiment, "models_of", lambda *args: ("gpt", "sft", "rm"))
    monkeypatch.setattr(experiment, "apart", apart)
    monkeypatch.setattr(experiment, "metrics_of", lambda run: {Path(run).name: [1.0, 2.0]})
    lab = SimpleNamespace(cfg=experiment.Config(quick=True), folder="t")
    rows = experiment.measured(lab, stage, "x", 1)
    assert runs == wanted
    assert rows == [{"metric": run[0], "first": 1.0, "last": 2.0} for run in wanted]


def test_the_band_is_of_all_four_stages_and_of_each_seed(monkeypatch, tmp_path):
    monkeypatch.setattr(experiment, "models_of", lambda cfg, seed: (f"{tmp_path}/{seed}",) * 3)
    monkeypatch.setattr(experiment, "apart", lambda cfg: f"{tmp_path}/{cfg.seed}")
    for seed in (3, 4):
        (tmp_path / str(seed)).mkdir()
        (tmp_path / f"{seed}/metrics.csv").write_text(f"step,loss,kl_k2\n0,{seed}.123456,1\n1,,2\n")
    lab = Lab(experiment.Config(str(tmp_path), band=[3, 4, 3]), "mistakes", "seed", "steps")
    experiment.write_band(lab)
    with (lab.folder / "healthy.csv").open() as file:
        rows = list(experiment.csv.DictReader(file))
    assert len(rows) == 16  # two seeds of four stages, with two steps each
    assert [(r["stage"], r["seed"]) for r in rows[::2]] == [
        (stage, seed) for seed in "34" for stage in ("gpt", "sft", "rm", "ppo")
    ]
    assert rows[0]["loss"] == "3.123" and rows[1]["loss"] == "" and "kl_k2" not in rows[0]
