"""A user's own script beside the four, in whatever style, is no concern of `make test`."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FORK = """import train_ppo, os
print( "what runs at import is the fork's affair" )
class Config(train_ppo.Config) :
        my_coef : float=0.5
"""


def test_a_fork_at_the_root_fails_no_check_of_the_project(tmp_path):
    ours = shutil.ignore_patterns(".*", "out*", "__pycache__", "*.egg-info")
    clone = shutil.copytree(ROOT, tmp_path / "clone", ignore=ours)
    (clone / "my_ppo.py").write_text(FORK)
    (clone / "train_mine.py").write_text(FORK)
    programs = Path(sys.executable).parent
    check = f"make -o .venv/test-installed BIN={programs} lint && "
    check += f"{programs}/python -m pytest tests/test_house.py"
    done = subprocess.run(check, shell=True, cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
