"""docs/course.ipynb runs whole, as in a reader's Jupyter, and prints what it promises."""

import os

import nbformat
import pytest
from nbclient import NotebookClient

from tests.test_course_docs import NUMBER


def printed(cell):
    return "".join(output.text for output in cell.outputs)


def numbers(text):
    return [float(number) for number in NUMBER.findall(text)]


def test_the_notebook_runs_and_prints_what_stands_below_its_cells(clone, monkeypatch):
    """In one kernel: a chapter that changed the world for those after it would be seen. What
    commands print depends on the processor and on which models there are; they must end well."""
    docs = clone / "docs"
    monkeypatch.setenv("PYTHONPATH", str(clone), prepend=os.pathsep)
    monkeypatch.setenv("HOME", str(clone))  # Jupyter's own files
    notebook = nbformat.read(docs / "course.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    promised = [printed(cell) for cell in cells]
    commands = [cell for cell in cells if cell.source.startswith("!")]
    for cell in commands:  # an exit status is no error to Jupyter
        cell.source += "\nassert _exit_code == 0"
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(docs)}}).execute()
    for cell, promise in zip(cells, promised):
        if cell not in commands:
            found = printed(cell)
            assert NUMBER.sub("#", found).split() == NUMBER.sub("#", promise).split(), cell.source
            assert numbers(found) == pytest.approx(numbers(promise), abs=0.011), cell.source
    assert (clone / "out/small_gpt").is_dir()
