"""What README.md and docs/ type can be typed: every command in a fenced block runs in order, one
shell per file, at toy size, and ends with exit status 0. stand_in.py says which are left out."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.hf.folders import byte_level, chat_folder, write
from tests.slow.stand_in import shrunk

ROOT = Path(__file__).parents[2]
DEMO = """
for stage in gpt sft rm ppo; do python train_$stage.py; done
python -m nanorlhf evaluate
"""  # what `make demo` does; the chapters go on from there
COMMAND = r"(\.venv/bin/)?python3? |torchrun "
SHELL = COMMAND + r"|[A-Z]\w*=|export |for \w+ in |  |done"  # what else of a block bash may see


def typed_in(text):
    """The shell lines of a document's blocks that hold a command."""
    for block in re.findall(r"^```(?:sh|bash)?\n(.*?)^```", text, re.S | re.M):
        lines = block.replace("\\\n", " ").splitlines()
        if any(re.match(COMMAND + r"|for \w+ in ", line) for line in lines):
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


HUB = """
import fnmatch, pathlib, tempfile
import huggingface_hub

def snapshot_download(name, allow_patterns=None, **_):
    folder = pathlib.Path({root!r}, "chat" if "/" in name else "gpt2")
    copy = pathlib.Path(tempfile.mkdtemp())
    for path in folder.iterdir():
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
            (copy / path.name).symlink_to(path)
    return str(copy)

huggingface_hub.snapshot_download = snapshot_download
"""

DATA = {"train_sft.py": "prompt_completion.jsonl", "train_rm.py": "orca_dpo_pairs.jsonl"}


def test_recipes_that_name_a_model_of_the_hub_get_it_with_its_template(clone, monkeypatch):
    """Through a stand-in that hands over what is asked for and no more, on data of our own."""
    chat_folder(clone / "hub/chat", "a default system text")
    names = {"eos_token": "<|endoftext|>"}
    write(clone / "hub/gpt2", byte_level("gpt2", names.values()), kind="gpt2", **names)
    (clone / "sitecustomize.py").write_text(HUB.format(root=str(clone / "hub")))
    monkeypatch.setenv("PYTHONPATH", str(clone), prepend=os.pathsep)
    documents = sorted((ROOT / "docs").rglob("*.md"))
    monkeypatch.setenv("ONLY_READ", "yes")
    typed = type_all(["\n".join(typed_in(d.read_text())) for d in documents], clone)
    monkeypatch.delenv("ONLY_READ")
    words = {tuple(e["command"].split()[1:]) for e in typed if "--init" in e["command"]}
    recipes = {(w[0], w[w.index("--init") + 1]) for w in words}
    of_hub = lambda script, init: re.match(r"hf:|gpt2", init) and script in DATA
    recipes = {recipe for recipe in recipes if of_hub(*recipe)}
    assert any(init.startswith("hf:") for _, init in recipes) and len(recipes) >= 3, recipes
    for script, init in sorted(recipes):
        command = [script, "--init", init, "--device", "cpu", "--out_dir", "out/recipe"]
        command += ["--data", f"{ROOT}/tests/fixtures/{DATA[script]}"]
        done = subprocess.run(
            [sys.executable, *shrunk(command)], cwd=clone, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        templates = list((clone / "out/recipe").glob("step_*/tokenizer/chat_template.jinja"))
        assert len(templates) == ("/" in init), command
        shutil.rmtree(clone / "out/recipe")
