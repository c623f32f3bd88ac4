"""What README.md and docs/ type and name exists: commands, flags, files, functions, links."""

import ast
import dataclasses
import importlib
import importlib.util
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from nanorlhf import functional, fused
from nanorlhf.__main__ import COMMANDS as TOOLS
from nanorlhf.config import from_cli

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted(ROOT.glob("docs/**/*.md"))
PAGES = {str(p.relative_to(ROOT)): p.read_text() for p in [ROOT / "README.md", *CHAPTERS]}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
DEMO = ("train_gpt", "train_sft", "train_rm", "train_ppo")
TORCHRUN = {"standalone", "nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint"}
each_page = pytest.mark.parametrize("page", PAGES)


def commands(text):
    """The commands of a page: lines of its blocks, with what the block's NAME=value lines set put
    in for $NAME, and what stands in backticks. Tables write `train_ppo.py --flag` for short."""
    found = []
    for language, block in FENCE.findall(text):
        known = {}
        for line in block.replace("\\\n", " ").splitlines() if not language else []:
            line = re.sub(r"\$(\w+)", lambda m: known.get(m[1], m[0]), line.partition(" #")[0])
            if setting := re.fullmatch(r"(?:export )?(\w+)=(\S+|\".*\")", line.strip()):
                known[setting[1]] = setting[2].strip('"')
            else:
                found.append(line)
    found += re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    found = [re.sub(r"^((\w+=\S+|\.venv/bin/python|python3) )+", "python ", c) for c in found]
    found = [re.sub(r"^torchrun( --\S+)+", "python", c) for c in found]
    found = [re.sub(r"^(train_\w+\.py --)", r"python \1", c) for c in found]
    return [re.sub("^python python", "python", c) for c in found if re.match("python |bash ", c)]


COMMANDS = [(page, command) for page, text in PAGES.items() for command in commands(text)]


def module_of(words):
    """The module whose Config reads a command's flags, and the flags; None: another program."""
    if words[1:3] == ["-m", "nanorlhf"]:
        return f"nanorlhf.tools.{words[3]}", words[4:]
    if words[1] == "-m":
        return (words[2], words[3:]) if words[2].startswith("experiments.") else (None, [])
    name = words[1].removesuffix(".py").replace("/", ".")
    given = name.startswith(("train_", "experiments.")) or hasattr(load(name), "Config")
    return (name, words[2:]) if given else (None, [])


@cache
def load(name):
    return importlib.import_module(name)


def test_the_pages_have_commands():
    assert len(COMMANDS) > 50 and len(PAGES) >= 7


@pytest.mark.parametrize("page, command", COMMANDS)
def test_every_command_is_one_that_its_program_takes(page, command):
    words = shlex.split(command)
    for word in words[1:]:
        if re.match(r"(tests|examples|experiments|train_\w+)[\w./]*\.(py|sh|jsonl)$", word):
            assert (ROOT / word).is_file(), word
    if words[0] == "bash":
        return
    if words[1:] == ["-m", "nanorlhf"]:
        return
    if words[1] == "-m" and words[2] != "nanorlhf":
        assert importlib.util.find_spec(words[2]), words[2]
        return
    name, given = module_of(words)
    if name:
        from_cli(load(name).Config, given)  # exits 2 for a flag or a value that it does not know


def test_what_you_judge_replaces_none_of_the_demos_models():
    """Whoever follows docs/human.md trains into folders of their own."""
    blocks = "".join(block[0] for block in FENCE.finditer(PAGES["docs/human.md"]))
    trained = [shlex.split(c) for c in commands(blocks) if c.startswith("python train_")]
    folders = [from_cli(load(words[1][:-3]).Config, words[2:]).out_dir for words in trained]
    assert len(folders) == 2 and not set(folders) & {load(stage).Config().out_dir for stage in DEMO}


@cache
def flags():
    """{flag: the fields of that name, of all programs}."""
    stages = [p.stem for p in ROOT.glob("train_*.py")]
    tools = [f"nanorlhf.tools.{name}" for name in TOOLS]
    more = [f"{p.parent.name}.{p.stem}" for p in ROOT.glob("ex[ap]*/*.py")]
    found = {}
    for name in stages + tools + more:
        for field in dataclasses.fields(load(name).Config) if hasattr(load(name), "Config") else ():
            found.setdefault(field.name, []).append(field)
    return found


@each_page
def test_every_flag_exists_and_takes_the_value_that_is_written_beside_it(page):
    text = PAGES[page]
    mentioned = set(re.findall(r"(?<![\w-])--(?:no-)?([a-z]\w*)", text)) - {"help"} - TORCHRUN
    assert mentioned <= flags().keys(), mentioned - flags().keys()
    for name, value in re.findall(r"`[^`\n]*?--(\w+) (\w+)[^`\n]*`", text):
        choices = [field.metadata["choices"] for field in flags().get(name, [])]
        if choices and all(choices):
            assert any(value in c for c in choices), f"--{name} {value}"


@each_page
def test_every_make_target_exists(page):
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    named = re.findall(r"(?:^|`)make (\w+)(?=`|$| {2}| SEED)", PAGES[page], re.M)
    assert set(named) <= targets, set(named) - targets


# ---- names in backticks ------------------------------------------------------------------------


def in_backticks(page):
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", PAGES[page]))


@each_page
def test_every_file_exists(page):
    """Those of this project: a path into one of its folders, a script, or a row of file names."""
    rooms = [p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith((".", "out"))]
    ours = re.compile(rf"({'|'.join({*rooms, 'experiments'} - {'data'})})/[\w./*-]*|train_\w+\.py")
    for words in in_backticks(page):
        for word in words.split():
            path = word.partition(":")[0]
            if ours.fullmatch(path):
                assert list(ROOT.glob(path.rstrip("/"))), path


@each_page
def test_nobody_is_sent_to_a_folder_that_a_clone_does_not_have(page):
    to_docs = r"(?<=\]\()\.\./" if "course/" in page else "$^"  # a link of the course to docs/
    text = re.sub(to_docs, "", PAGES[page])
    assert not re.search(r"(?<![\w.])\.\./(?!README\.md)|(?<![\w.`])/(home|work|root|tmp)/", text)


@each_page
def test_every_test_exists(page):
    tests = "\n".join(p.read_text() for p in ROOT.glob("tests/**/*.py"))
    for name in re.findall(r"\btest_\w+", " ".join(in_backticks(page))):
        assert f"def {name}(" in tests or list(ROOT.glob(f"tests/**/{name}.py")), name


@cache
def definitions(path):
    """{name: its line} of functions, classes, methods, fields and constants of a file."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node.lineno
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    found[target.id] = node.lineno
    return found


@each_page
def test_what_is_said_to_be_in_a_file_is_there(page):
    """`name` in `file.py`, and `name` (`file.py:LINE`)."""
    claims = re.findall(r"`(?:\w+\.)*(\w+)`\s+(?:in|\()\s*`([\w/]+\.py)(?::(\d+))?`", PAGES[page])
    for name, file, line in claims:
        there = definitions(ROOT / file)
        assert name in there, f"{name} in {file}"
        assert not line or there[name] == int(line), f"{name} is in line {there[name]} of {file}"


@each_page
def test_every_function_exists(page):
    """Names in backticks that look like code occur in this project's code, whatever they are."""
    sources = [*ROOT.glob("*.py"), *ROOT.glob("nanorlhf/**/*.py"), *ROOT.glob("ex[ap]*/*.py")]
    words = set(re.findall(r"\w+", " ".join(p.read_text() for p in sources)))
    for name in in_backticks(page):
        if re.fullmatch(r"([A-Za-z]+\.)?[a-z]+(_[a-z]+)+", name) and not name.startswith("test_"):
            parts = set(re.sub(r"^(val|eval)_", "", name).split("."))
            assert parts <= words, f"{name}: {parts - words}"


def test_the_stages_of_the_readme_name_functions_of_the_maths():
    table = PAGES["README.md"].split("## The four stages")[1].split("\n## ")[0]
    functions = [row.split("|")[3] for row in table.splitlines() if row.startswith("| `train_")]
    names = [name for cell in functions for name in re.findall(r"`(\w+)`", cell)]
    assert len(functions) == 4 and len(names) > 8
    for name in names:
        assert hasattr(functional, name) or hasattr(fused, name), name


@each_page
def test_python_in_a_page_compiles_and_names_what_exists(page):
    for language, block in FENCE.findall(PAGES[page]):
        if language != "python":
            continue
        tree, modules = ast.parse(block), {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                there = [a for a in node.names if a.name != "trackio"]  # a reader's own tracker
                modules |= {a.asname or a.name: load(a.name) for a in there}
            elif isinstance(node, ast.ImportFrom):
                for a in node.names:  # a module in a folder is an attribute once it is imported
                    parent, name = load(node.module), f"{node.module}.{a.name}"
                    is_module = hasattr(parent, "__path__") and not hasattr(parent, a.name)
                    there = load(name) if is_module else getattr(parent, a.name)
                    modules[a.asname or a.name] = there
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = modules.get(node.value.id)
                assert owner is None or hasattr(owner, node.attr), ast.unparse(node)


# ---- shape and links ---------------------------------------------------------------------------


def test_the_readme_is_two_screens():
    text = PAGES["README.md"]
    assert len(text.splitlines()) <= 220 and len(text.encode()) <= 14 * 1024


def test_every_chapter_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\(([\w/]+\.md)", PAGES["README.md"]))
    assert {page for page in PAGES if page.count("/") == 1} <= linked and len(linked) >= 6
    course = set(re.findall(r"\]\((\w+\.md)", PAGES["docs/course/README.md"]))
    assert {Path(page).name for page in PAGES if "course/" in page} == course | {"README.md"}


def anchors(text):
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)", FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@each_page
def test_every_link_and_picture_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.is_file(), target
        assert not anchor or anchor in anchors(path.read_text()), target


def test_every_picture_in_docs_is_shown():
    shown = {
        Path(t).name for text in PAGES.values() for t in re.findall(r"!\[.*?\]\((.*?)\)", text)
    }
    drawn = {p.name for kind in ("png", "svg") for p in ROOT.glob(f"docs/**/*.{kind}")}
    assert drawn == shown
