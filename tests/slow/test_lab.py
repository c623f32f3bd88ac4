"""The experiments run whole, at the size of --quick, and what is there is not run again."""

import subprocess
import sys

import pytest

from experiments import lab

EXPERIMENTS = [("overoptimization", True), ("what_matters", True), ("uncertain", False)]


@pytest.mark.parametrize("name, picture", EXPERIMENTS)
def test_an_experiment_runs_quickly_and_only_once(clone, tmp_path, name, picture):
    flag = ["--out", "lab"]
    if name == "uncertain":
        _, sft = lab.sft_of(lab.LabConfig(out=str(clone / "lab"), quick=True), 1)
        flag += ["--sft", sft]
    command = [sys.executable, "-m", f"experiments.{name}", "--quick", *flag]
    said = []
    for _ in range(2):
        done = subprocess.run(command, cwd=clone, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert " done\n" in said[0] and " done\n" not in said[1]
    rows = (clone / f"lab/{name}-quick/results.csv").read_text().splitlines()
    assert len(rows) > 4 and len(set(rows)) == len(rows)
    assert (clone / f"lab/{name}-quick/{name}.png").exists() == picture
