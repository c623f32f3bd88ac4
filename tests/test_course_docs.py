"""The chapters of docs/course say what the code says: quotations are the source, cells print what
stands below them, and no chapter is longer than an evening allows. Their links, files and flags are
checked with those of all pages, in tests/test_readme.py.

A quotation stands below `<!-- module.function -->`, a cell below `<!-- runs -->`, with its output
in the ```text block that follows.
"""

import ast
import contextlib
import importlib
import inspect
import io
import re
from pathlib import Path

import pytest
import torch

from experiments import small_world as world
from experiments.small_world import walk
from nanorlhf import functional

COURSE = Path(__file__).parents[1] / "docs/course"
CHAPTERS = sorted(COURSE.glob("[1-7]_*.md"))
QUOTE = re.compile(r"<!-- (\w[\w.]+\.\w+) -->\n```python\n(.*?)```\n", re.S)
CELL = re.compile(r"<!-- runs -->\n```python\n(.*?)```\n\n```text\n(.*?)```\n", re.S)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")
each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def source(name):
    """A function as it stands in its file, without its docstring."""
    module, _, name = name.rpartition(".")
    text = inspect.getsource(getattr(importlib.import_module(module), name))
    first, *rest = ast.parse(text).body[0].body
    assert ast.get_docstring(ast.parse(text).body[0]) is not None, f"{name}: quote it whole"
    lines = text.splitlines(keepends=True)
    return "".join(lines[: first.lineno - 1] + lines[first.end_lineno :])


def printed(cell, names):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(cell, names)
    return out.getvalue()


def test_there_are_seven_chapters():
    assert [path.stem[0] for path in CHAPTERS] == list("1234567")


@each_chapter
def test_quotations_are_the_source(path):
    text = path.read_text()
    quotations = QUOTE.findall(text)
    assert quotations and len(quotations) == len(re.findall(r"<!-- [\w.]+\.\w+ -->", text))
    for name, code in quotations:
        assert code == source(name), name


@each_chapter
def test_cells_print_what_stands_below_them(path, tmp_path, monkeypatch):
    """Words alike, numbers to one unit of their last digit: processors round differently."""
    text, names = path.read_text(), {}
    monkeypatch.chdir(tmp_path)  # some draw
    cells = CELL.findall(text)
    assert cells and len(cells) == text.count("<!-- runs -->")
    for cell, promised in cells:
        found = printed(cell, names)
        assert NUMBER.sub("#", found).split() == NUMBER.sub("#", promised).split(), found
        for x, y in zip(NUMBER.findall(found), NUMBER.findall(promised)):
            unit = 10.0 ** -len(y.partition(".")[2])
            assert x == y or abs(float(x) - float(y)) < 1.01 * unit, f"{x} for {y}\n{found}"


def test_the_table_of_chapter_5_has_the_numbers_of_its_response():
    """What belongs to which token of "aab.", half-way to the optimum, and to a pad behind it."""
    ref = world.log_probs(world.Table(0)).detach()
    logprobs, ref_logprobs, values = walk("aab.", world.optimum(ref, 2 * world.BETA), ref)
    kl, mask = logprobs - ref_logprobs, torch.ones(1, 4, dtype=torch.bool)
    rewards = functional.shaped_rewards(torch.tensor([0.4]), kl, mask, world.BETA)
    numbers = {
        "value of that state": values,
        "log-prob, policy": logprobs,
        "log-prob, reference": ref_logprobs,
        "KL of the token, k1": kl,
        "reward: -0.5 KL, and score": rewards,
        "advantage": functional.gae(rewards, values, mask)[0],
    }
    rows = [
        ["", "t = 0", "t = 1", "t = 2", "t = 3", "pad"],
        ["---"] * 6,
        ["state: what has been read", "prompt", "… a", "… aa", "… aab", "–"],
        ["action: the next token", "`a`", "`a`", "`b`", "`.`", "`pad`"],
        *([name, *(f"{x:+.2f}" for x in row[0].tolist()), "–"] for name, row in numbers.items()),
        ["`response_mask`", "True", "True", "True", "True", "False"],
    ]
    page = (COURSE / "5_update.md").read_text()
    table = re.search(r"^\| \| t = 0 .*\n(?:\|.*\n)+", page, re.M)[0].splitlines()
    for line, row in zip(table, rows, strict=True):
        assert [cell.strip() for cell in line.split("|")[1:-1]] == row


@each_chapter
def test_a_chapter_is_read_in_ten_to_twenty_minutes(path):
    text = path.read_text()
    shown = len(re.findall(r"^```python|^!\[", text, re.M))
    apart = r"^```.*?^```|<!--.*?-->|</?(?:details|summary)>|\$\$.*?\$\$"
    words = re.sub(apart, "", text, flags=re.M | re.S).split()
    assert len(words) <= 1800 and 8 <= shown <= 12, (len(words), shown)


@each_chapter
def test_a_chapter_has_its_question_its_mistake_its_exercises_and_its_quiz(path):
    text, number = path.read_text(), path.stem[0]
    for heading in ("## Type this", "## The mistake", "## Exercises", "## Quiz"):
        assert text.count(heading) == 1, heading
    assert text.count("<details>") == text.count("</details>") == 3
    exercises = re.findall(r"nanorlhf exercise (\d)\.\d", text)
    assert exercises and set(exercises) == {number}


def test_the_chapters_name_the_exercises_that_there_are():
    exercise = pytest.importorskip("nanorlhf.tools.exercise")
    text = "".join(path.read_text() for path in CHAPTERS)
    named = re.findall(r"nanorlhf exercise (\d\.\d)", text)
    assert sorted(named) == sorted(e.number for e in exercise.EXERCISES)


def test_the_glossary_has_every_function_of_the_maths():
    glossary = (COURSE / "glossary.md").read_text()
    names = {n for n, _ in inspect.getmembers(functional, inspect.isfunction) if n[0] != "_"}
    assert {n for n in names if f"`{n}" not in glossary} == set()
