"""The house rules of the code itself: who imports whom, nothing runs at import, sizes."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = """config safety.durable safety.process functional fused model parallel tokenizer
formats.files formats.values formats.shapes formats.hf_tokenizer formats.hf_folder data world
batches sampling checkpoint hub scoring prompts safety.doctor log safety.session safety.selfcheck
engine""".split()
SCRIPTS = sorted(ROOT.glob("train_*.py"))
CORE = sorted((ROOT / "nanorlhf").glob("*.py"))
FORMATS = sorted((ROOT / "nanorlhf/formats").glob("*.py"))  # other people's: no part of the core
SAFETY = sorted((ROOT / "nanorlhf/safety").glob("*.py"))  # guards of the core: no part of it
TOOLS = sorted((ROOT / "nanorlhf/tools").rglob("*.py"))
PARTS = CORE + FORMATS + SAFETY
SOURCES = PARTS + TOOLS + SCRIPTS
each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))


def imported(path):
    """This project's modules that a file imports, anywhere in it: data, tools.chat, train_ppo."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import"
            parts = ("nanorlhf", "nanorlhf.formats", "nanorlhf.safety", "nanorlhf.tools")
            inside = node.module in parts
            names = [f"{node.module}.{a.name}" for a in node.names] if inside else [node.module]
            found |= set(names)
    ours = {n.removeprefix("nanorlhf.") for n in found if n.startswith("nanorlhf.")}
    return ours | {n for n in found if n.startswith("train_")}


def may_import(path):
    """The modules of the package, without tools, that a file may import."""
    if path not in PARTS or path.stem == "__main__":
        return set(ORDER)
    if path.stem == "__init__":
        return set()
    return set(ORDER[: ORDER.index(module(path))])


def module(path):
    return ".".join(path.relative_to(ROOT / "nanorlhf").with_suffix("").parts)


def length(node):
    """Lines of a function, its docstring apart."""
    lines = node.end_lineno - node.lineno + 1
    first = node.body[0]
    if ast.get_docstring(node) is not None:
        lines -= first.end_lineno - first.lineno + 1
    return lines


def test_every_module_has_its_place_in_the_order():
    names = {module(p) for p in PARTS if not p.stem.startswith("__")}
    assert names == set(ORDER)


@each_source
def test_modules_import_only_what_comes_before_them(path):
    """The modules in ORDER, then tools/, then the stages' scripts, which nothing imports."""
    tools = {name for name in imported(path) if name.split(".")[0] == "tools"}
    assert imported(path) - tools <= may_import(path)
    assert not tools or path not in PARTS or path.stem == "__main__", "the core imports a tool"


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


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_a_script_ends_with_its_guarded_main(path):
    *_, last = ast.parse(path.read_text()).body
    guard = 'if __name__ == "__main__":\n    main(from_cli(Config))'
    assert ast.unparse(last) == ast.unparse(ast.parse(guard))


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


def test_the_core_is_under_2200_lines_of_code():
    """Nor does anybody learn RLHF from how processes talk: parallel.py has a limit of its own."""
    plumbing = ROOT / "nanorlhf/parallel.py"
    assert 1000 < sum(lines_of_code(p) for p in CORE + SCRIPTS if p != plumbing) < 2200
    assert lines_of_code(plumbing) < 150
    # nobody learns RLHF from how CSV or a shard of safetensors is read
    assert 100 < sum(map(lines_of_code, FORMATS)) < 560
    assert 100 < sum(map(lines_of_code, SAFETY)) < 650


@pytest.mark.parametrize("path", PARTS, ids=lambda p: p.name)
def test_no_file_of_the_core_is_over_250_lines(path):
    lines = len(path.read_text().splitlines())
    assert lines <= 250


@each_source
def test_functions_are_under_40_lines_and_main_under_80(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            limit = 80 if node.name == "main" else 40
            assert length(node) < limit, f"{path}:{node.lineno}: {node.name}, {length(node)} lines"


@pytest.mark.parametrize("path", [*SOURCES, *sorted(ROOT.glob("tests/*.py"))], ids=lambda p: p.name)
def test_no_line_is_over_100_columns(path):
    long = [n for n, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100]
    assert not long, f"{path}: lines {long}"
