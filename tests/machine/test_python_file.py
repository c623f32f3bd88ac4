"""A user's file is loaded as Python would load it."""

import subprocess
import sys
from pathlib import Path

import pytest

from nanorlhf.machine.python_file import load_function
from tests.helpers import refused

ROOT = Path(__file__).parents[2]
FILES = {
    "words_of_mine.py": "GOOD = ('lamp', 'boat')",
    "neighbour.py": "from words_of_mine import GOOD\n"
    "def reward(p, r): return [float(sum(w in x for w in GOOD)) for x in r]",
    "later.py": "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    "@dataclass\nclass Rule:\n    word: str\n"
    "def reward(p, r): return [float(Rule('lamp').word in x) for x in r]",
    "pool.py": "from concurrent.futures import ProcessPoolExecutor\n"
    "from multiprocessing import get_context\n"
    "def points(x): return float('lamp' in x)\n"
    "def reward(p, r):\n"
    "    with ProcessPoolExecutor(1, get_context('spawn')) as pool:\n"
    "        return list(pool.map(points, r))",
}


@pytest.mark.parametrize("name", [name for name in FILES if name != "words_of_mine.py"])
def test_neighbours_dataclasses_and_pools_work(tmp_path, name):
    """In a process of its own, which a pool's processes imitate."""
    for file, source in FILES.items():
        (tmp_path / file).write_text(source)
    code = (
        "import sys; from nanorlhf.machine.python_file import load_function\n"
        "if __name__ == '__main__': print(load_function(sys.argv[1], '--reward')('', ['a lamp']))"
    )
    (tmp_path / "main.py").write_text(code)
    argv = [sys.executable, str(tmp_path / "main.py"), f"{tmp_path / name}:reward"]
    done = subprocess.run(
        argv, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.stdout == "[1.0]\n", done.stderr


def test_files_of_one_name_are_two_modules_and_one_file_is_loaded_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # else later tests would find this statistics.py
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "statistics.py").write_text(f"def f(): return {folder!r}\nN = []")
    load = lambda folder: load_function(f"{tmp_path}/{folder}/statistics.py:f", "--reward")
    assert load("a")() == "a" and load("b")() == "b"  # and Python's own statistics is neither
    assert load("a") is load("a")


def test_a_file_without_the_function_says_what_it_has(tmp_path, capsys):
    path = tmp_path / "plain_one.py"
    path.write_text("from os.path import join\ndef first(p, r): pass\ndef second(p, r): pass")
    for spec, asked in ((path, f"which function? --gold {path}:NAME"), (f"{path}:x", "'x'")):
        said = refused(capsys, load_function, str(spec), "--gold")
        assert asked in said and said.endswith("it defines first, second")
    for spec in (f"{tmp_path}/none.py:f", str(tmp_path), "f", f"{tmp_path}/none.py"):
        assert "is not a Python file" in refused(capsys, load_function, spec, "--reward")
