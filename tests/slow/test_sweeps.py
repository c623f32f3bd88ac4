"""One short sweep of each kind, the same every time; `make accidents`, `make fuzz` and
`make mutants` are the long ones."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def python(*words, **env):
    """(exit status, all that was said) of a command that shows no traceback."""
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert "Traceback" not in done.stdout, done.stdout
    return done.returncode, done.stdout


def test_runs_to_which_accidents_happen_end_as_undisturbed_ones_do():
    status, said = python("tests.sweeps.accidents", "8", "2")
    assert status == 0, said
    whole = "2 kills, 2 signals, 2 full disks, 2 lost folders, 2 second runs: 0 complaints"
    assert said.count(whole) == 4


def test_bad_input_is_read_or_refused():
    status, said = python("pytest", "tests/sweeps/test_fuzz.py", FUZZ="40", SEED="1")
    assert status == 0, said
    assert int(re.search(r"(\d+) inputs in .* 0 failures", said)[1]) > 4000


def test_no_mutant_of_the_maths_survives_unexplained():
    flags = ["--files", "functional", "--jobs", "1", "--sample", "40"]
    status, said = python("tests.sweeps.mutants", *flags)
    assert status == 0 and "listed" not in said, said
    assert re.search(r"functional.py: .*; 100.0% killed", said)


def test_mutants_of_the_ppo_loop_can_be_made():
    """How many of ten survive is chance, and not asked."""
    flags = ["--files", "ppo", "--jobs", "1", "--sample", "10"]
    status, said = python("tests.sweeps.mutants", *flags)
    assert status in (0, 1) and re.search(r"train_ppo.py: .* killed", said), said
