"""The house rules of the code itself: who imports whom, and that nothing runs at import.

python -m tests.test_house     # lines of code, room by room
"""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nanorlhf"
ORDER = """
machine.process config machine.compiled functional fused machine.durable machine.ranks
machine.device machine.python_file model llama data.values tokenizer bpe data.split data.formats
data.files data.shapes data.examples data.world data.dialogue data.batches hf.folder
hf.template hf.tokenizer hf.load hf.export sampling run.checkpoint loading judge_file mixing
scoring run.metrics run.doctor run.log run.session run.selfcheck engine rollout speaker feedback
sources report judging picture
""".split()
BESIDE = ("human", "course")  # what tools/ stands on besides
LATE = {"engine": {"course.mistakes"}}  # imported only by a run that is to be broken
SCRIPTS = [ROOT / f"train_{stage}.py" for stage in ("gpt", "sft", "rm", "ppo")]
PARTS = sorted(PACKAGE.rglob("*.py"))
SOURCES = PARTS + SCRIPTS  # a fork of a script, beside them, keeps whatever rules it likes
each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
each_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)


def imported(path):
    """This project's modules that a file imports, anywhere in it: data.world, train_ppo."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import"
            is_room = (ROOT / node.module.replace(".", "/")).is_dir()
            found |= {f"{node.module}.{a.name}" if is_room else node.module for a in node.names}
    ours = {n.removeprefix("nanorlhf.") for n in found if n.startswith("nanorlhf.")}
    return ours | {n for n in found if n.startswith("train_")}


def module(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def may_import(path):
    """A module of the lesson what stands before it in ORDER, a script all of these; human/ and
    course/ besides what lies in the same folder, and tools/ what they like."""
    if path in SCRIPTS:
        return set(ORDER)
    name = module(path)
    if path.stem == "__init__":  # the package's own is what notebooks call
        return set(ORDER) if path.parent == PACKAGE else set()
    if name in ORDER:
        return set(ORDER[: ORDER.index(name)]) | LATE.get(name, set())
    rooms = {room: {module(p) for p in PACKAGE.glob(f"{room}/*.py")} for room in BESIDE}
    if (room := name.partition(".")[0]) in BESIDE:
        return {*ORDER, *rooms[room]}
    return {*ORDER, *set().union(*rooms.values()), *(module(p) for p in PACKAGE.glob("tools/*.py"))}


def test_every_module_has_its_place_in_the_order():
    rooms = (*(f"{room}." for room in BESIDE), "tools.", "__main__")
    names = {module(p) for p in PARTS if p.stem != "__init__"}
    assert {n for n in names if not n.startswith(rooms)} == set(ORDER)


@each_source
def test_modules_import_only_what_comes_before_them(path):
    assert imported(path) <= may_import(path), imported(path) - may_import(path)


def test_no_room_imports_one_that_imports_it():
    """Rooms are folders: what is imported late, inside a function, counts too."""
    room_of = lambda name: name.split(".")[0] if (PACKAGE / name.split(".")[0]).is_dir() else None
    arrows = {
        (room_of(module(path)), room_of(name))
        for path in PARTS
        for name in imported(path)
        if None not in (room_of(module(path)), room_of(name))
    }
    order = TopologicalSorter()  # raises CycleError, which names the rooms
    for room, other in arrows:
        if room != other:
            order.add(room, other)
    assert list(order.static_order())[0] == "machine", "everything stands on machine/"


def test_ppo_imports_the_lesson_and_little_else():
    """What a reader of train_ppo.py may have to open: no other people's folders, no pages."""
    code = "import sys, train_ppo; print(*(m.__file__ for m in sys.modules.values() if m.__name__ "
    code += "in ('train_ppo', 'nanorlhf') or m.__name__.startswith('nanorlhf.')), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    files, script = [Path(line).resolve() for line in done.stdout.splitlines()], SCRIPTS[-1]
    rooms = {path.parent.name for path in files}
    assert script in files and not rooms & {"hf", "human", "tools"}, rooms
    assert sum(map(lines_of_code, files)) <= 3400
    assert len(imported(script)) <= 12 and lines_of_code(script) <= 177


@each_source
def test_a_file_only_defines_things(path):
    """Statements at the top of a file: a docstring, imports, definitions, constants, the guard."""
    plain = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for i, node in enumerate(ast.parse(path.read_text()).body):
        docstring = i == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        guard = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        assert docstring or guard or isinstance(node, plain), f"{path}:{node.lineno}"


def test_importing_anything_prints_nothing_and_writes_nothing(tmp_path):
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in SOURCES]
    code = "\n".join(f"import {m.removesuffix('.__init__')}" for m in modules)
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@each_script
def test_a_script_ends_with_its_guarded_main(path):
    *_, last = ast.parse(path.read_text()).body
    guard = 'if __name__ == "__main__":\n    main(from_cli(Config))'
    assert ast.unparse(last) == ast.unparse(ast.parse(guard))


# ---- the honest table --------------------------------------------------------------------------


def lines_of_code(path):
    """How many lines hold code: blank ones, comments and docstrings apart."""
    text = path.read_text()
    docstrings = {
        n
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node)
        for n in range(node.body[0].lineno, node.body[0].end_lineno + 1)
    }
    numbered = enumerate(map(str.strip, text.splitlines()), 1)
    return sum(bool(s) and not s.startswith("#") and n not in docstrings for n, s in numbered)


def rooms():
    """{room: its files}, all that the project holds."""
    found = {"train_*.py": SCRIPTS, "nanorlhf/*.py": sorted(PACKAGE.glob("*.py"))}
    inside = sorted(p.parent.relative_to(ROOT) for p in PACKAGE.glob("*/__init__.py"))
    for room in (*map(str, inside), "experiments", "examples", "tests"):
        found[room] = sorted((ROOT / room).rglob("*.py"))
    return {room: files for room, files in found.items() if files}


def test_the_table_counts_every_file():
    counted = [p for files in rooms().values() for p in files]
    assert len(counted) == len(set(counted)) and set(SOURCES) <= set(counted)
    assert lines_of_code(Path(__file__)) > 50


def table():
    """(room, files, lines of code), then the sums that the project is held to. The course is in
    neither: nothing of it runs unless a reader asks for an exercise or a mistake."""
    counted = [
        (room, len(files), sum(map(lines_of_code, files))) for room, files in rooms().items()
    ]
    total = lambda name, parts: (name, *map(sum, zip(*(row[1:] for row in parts))))
    project = [row for row in counted if row[0] != "nanorlhf/course"]
    package = [row for row in project if row[0].startswith("nanorlhf")]
    but_tests = [row for row in project if row[0] != "tests"]
    return [*counted, total("the package", package), total("all but tests", but_tests)]


def test_the_page_on_trust_has_the_table():
    """So a change of size is seen where it is made; tests alone may grow without a word."""
    page = (ROOT / "docs/trust.md").read_text()
    for row in table():
        assert row[0] == "tests" or "| {} | {} | {:,} |".format(*row) in page, row


if __name__ == "__main__":
    for row in table():
        print("| {} | {} | {:,} |".format(*row))
