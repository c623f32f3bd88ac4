"""docs/course.ipynb: the chapters of docs/course as one notebook.

    python -m nanorlhf.course.notebook

Prose and quoted functions become text. Cells that a chapter runs, and commands whose output it
shows, become code, and their outputs are those that the chapter promises. So the same chapters
always give the same file, on any machine. tests/slow/test_notebook.py runs the notebook and
compares what it prints.
"""

import json
import re

from nanorlhf.machine.python_file import ROOT

NOTEBOOK = ROOT / "docs/course.ipynb"
CELL = re.compile(
    r"(?:<!-- runs -->\n```python\n|^```\n(?=python ))([^`]*)```\n\n```text\n([^`]*)```\n", re.M
)
NAVIGATION = re.compile(r"^.*\[The course\]\(README.md\).*\n", re.M)  # to the chapters beside it
LINK = re.compile(r"\]\((?=[\w./]+\.(?:md|png|svg)\b)")
INTRODUCTION = """# The course

The [seven chapters](README.md) in one place, to read and to run. Run the next cell first. Then
begin with any chapter: its cells need those above them in the same chapter, and none of another.
Below a cell stands what it prints, and below a command a part of it.

Exercises are files that you fill in, so their commands are typed in a terminal, at the root of the
clone. JupyterLab has one: File, New, Terminal. `make demo`, typed there, trains the four stages
while you read.

*This file is built from the chapters by `python -m nanorlhf.course.notebook`.*
"""
SETUP = """\
import os
import sys
from pathlib import Path

import nanorlhf  # not found? The kernel must be the Python into which the project is installed

os.chdir(Path(nanorlhf.__file__).parents[1])  # the clone: commands are typed at its root
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # !python
"""


def new_cell(kind, text, **more):
    lines = text.strip().splitlines(keepends=True)
    return {"cell_type": kind, "metadata": {}, **more, "source": lines}


def code_cell(code, output=""):
    """A line that begins with `python` is a command: Jupyter wants a ! before it."""
    code = re.sub(r"^(?=python )", "!", code, flags=re.M)
    printed = output.splitlines(keepends=True)
    stream = {"name": "stdout", "output_type": "stream", "text": printed}
    outputs = [stream] if printed else []
    return new_cell("code", code, execution_count=None, outputs=outputs)


def text_cells(prose):
    """One for each section, so that it can be folded. Links are seen from docs/, not from
    docs/course/."""
    prose = LINK.sub("](course/", NAVIGATION.sub("", prose)).replace("](course/../", "](")
    sections = re.split(r"^(?=## )", prose, flags=re.M)
    return [new_cell("markdown", section) for section in sections if section.strip()]


def chapter_cells(chapter):
    prose, *rest = CELL.split(chapter)  # then code, output and prose, over and over
    cells = text_cells(prose)
    for code, output, prose in zip(rest[::3], rest[1::3], rest[2::3]):
        cells += [code_cell(code, output), *text_cells(prose)]
    return cells


def build():
    """The notebook as Jupyter writes it to a file (nbformat 4.4)."""
    cells = [*text_cells(INTRODUCTION), code_cell(SETUP)]
    for path in sorted(ROOT.glob("docs/course/[1-7]_*.md")):
        cells += chapter_cells(path.read_text())
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    notebook = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 4}
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


if __name__ == "__main__":
    NOTEBOOK.write_text(build())
