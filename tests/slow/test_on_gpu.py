"""examples/on_gpu.sh, which a GPU sees once in a while, at toy size on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SAYS = {  # part: what its file holds when it has done its work
    "checks": " passed",
    "demo": "reward model against gold",
    "speed": '"gen_',
    "memory": "1 passed",
    "resume": "1 passed",
    "kl0": "\n2,",
    "compiled": '"update_seconds"',
    "peers": '"gen_',
}


def test_every_part_of_on_gpu_runs_and_says_what_it_must(tmp_path):
    # no C++ compiler: on a CPU its kernels take minutes, and tests/test_compiled.py has them
    env = {"SIZE": "toy", "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "CXX": "none"}
    command = ["bash", "examples/on_gpu.sh", *SAYS, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True)
    said = {part: (tmp_path / f"{part}.txt").read_text() for part in SAYS}
    assert done.returncode == 0, done.stdout + "".join(text[-1000:] for text in said.values())
    summary = (tmp_path / "summary.txt").read_text()
    for part, words in SAYS.items():
        assert f"{part}: exit status 0 after" in summary
        assert words in said[part], f"{part}: {said[part]}"
    assert json.loads((tmp_path / "ladder.json").read_text())[-1]["model"] == "ppo"
    assert (tmp_path / "ppo_metrics.csv").read_text().startswith("step,")


def test_only_the_parts_that_are_named_run(tmp_path):
    env = {"SIZE": "toy", "PYTHON": "true", "CUDA_VISIBLE_DEVICES": ""}
    for words, ran in ((["speed"], ["speed"]), (["kl0"], ["demo", "kl0"]), ([], [*SAYS][:6])):
        command = ["bash", "examples/on_gpu.sh", *words, str(tmp_path)]
        subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True)
        summary = (tmp_path / "summary.txt").read_text().splitlines()
        assert [line.split(":")[0] for line in summary if ": exit status" in line] == ran
