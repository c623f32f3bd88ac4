"""The experiments run whole, at the size of --quick, and what is there is not run again."""

import subprocess
import sys

import pytest

from experiments import lab

EXPERIMENTS = "overoptimization what_matters instructgpt_figure1 algorithms two_judges cures"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of all experiments, which share models."""
    return tmp_path_factory.mktemp("lab")


@pytest.mark.parametrize("name", EXPERIMENTS.split())
def test_an_experiment_runs_quickly_and_only_once(clone, out, name):
    flags = ["--quick", "--out", str(out)]
    if name == "what_matters":
        flags += ["--jobs", "2"]
    command = [sys.executable, "-m", f"experiments.{name}", *flags]
    said = []
    for _ in range(2):
        done = subprocess.run(command, cwd=clone, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        said.append(done.stdout)
    assert ": done, " in said[0] and ": done, " not in said[1]
    rows = (out / f"{name}-quick/results.csv").read_text().splitlines()
    assert len(rows) > 3 and len(set(rows)) == len(rows)
    assert (out / f"{name}-quick/{name}.png").exists()


def test_a_readers_own_model_gets_a_row(clone, out):
    own = lab.sft_of(lab.LabConfig(out=str(out), quick=True), 1)[1]
    command = [sys.executable, "-m", "experiments.algorithms", "--quick", "--out", str(out)]
    command += ["--only", "best of n", "--models", f"mine={own}"]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if line.startswith("mine "))
    assert "win 0.50" in row and "kl 0.00" in row  # it is SFT itself
