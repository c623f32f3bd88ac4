"""What README.md and docs/ type can be typed: every command in a fenced block runs in order, one
shell per file, at toy size, and ends with exit status 0. stand_in.py says which are left out."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEMO = """
for stage in gpt sft rm ppo; do python train_$stage.py; done
python -m nanorlhf evaluate
"""  # what `make demo` does; the chapters go on from there
COMMAND = r"(\.venv/bin/)?python3? |torchrun "
SHELL = COMMAND + r"|[A-Z]\w*=|export |for |  |done"  # what else of a block bash may see


def typed_in(text):
    """The shell lines of a document's blocks that hold a command."""
    for block in re.findall(r"^```(?:sh|bash)?\n(.*?)^```", text, re.S | re.M):
        lines = block.replace("\\\n", " ").splitlines()
        if any(re.match(COMMAND + "|for ", line) for line in lines):
            yield from (line for line in lines if re.match(SHELL, line))


def type_all(scripts, folder):
    """Run shell scripts where stand_in.py is `python`; what it wrote down."""
    for program in ("python", "python3", "torchrun", ".venv/bin/python"):
        stand_in = folder / ("" if "/" in program else "bin") / program
        stand_in.parent.mkdir(parents=True, exist_ok=True)
        name = stand_in.name.rstrip("3")
        stand_in.write_text(
            f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/slow/stand_in.py {name} "$@"\n'
        )
        stand_in.chmod(0o755)
    path = f"{folder}/bin:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "TYPED": f"{folder}/typed.jsonl"}
    for script in scripts:
        done = subprocess.run(["bash"], input=script, cwd=folder, env=env, text=True, stderr=-1)
        assert not done.stderr, f"{script}\n{done.stderr}"
    return [json.loads(line) for line in (folder / "typed.jsonl").read_text().splitlines()]


def test_what_the_documents_type_runs(clone):
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    chapters = ["\n".join(typed_in(document.read_text())) for document in documents]
    entries = type_all([DEMO, *chapters], clone)
    ran = [e for e in entries if not e["left_out"]]
    for entry in entries:
        print(entry["left_out"] or "ran", entry["command"], sep=": ")
    failed = [f"{e['command']}\n{e['said']}" for e in ran if e["status"]]
    assert not failed, "\n\n".join(failed)
    assert len(ran) >= 25  # that of DEMO is five


def test_rounds_with_a_simulated_person_run_and_are_not_run_again(clone):
    """`make loop`, without its installation."""
    loop = "LABELER=simulated ROUNDS=2 PYTHON=python bash examples/loop.sh > /dev/null\n"
    once = type_all([DEMO, loop], clone)
    assert not any(e["left_out"] or e["status"] for e in once), once
    tools = [e["command"].split()[3] for e in once if e["command"].startswith("python -m")]
    assert tools == ["evaluate", "label", "label", "evaluate"]
    again = type_all([loop], clone)[len(once) :]
    assert [e["command"].split()[3] for e in again] == ["evaluate"] and not again[0]["status"]
    rungs = [row["model"] for row in json.loads((clone / "out/ladder.json").read_text())]
    assert rungs[-2:] == ["round_1", "round_2"]
    for n in (1, 2):
        assert (clone / f"out/loop/{n}/judged.jsonl").read_text().count("simulated") > 10
