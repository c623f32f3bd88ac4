"""docs/course.ipynb is the chapters, and nothing else. tests/slow/test_notebook.py runs it."""

import re

import nbformat

from nanorlhf.course.notebook import NOTEBOOK, ROOT, build

CHAPTERS = [path.read_text() for path in sorted(ROOT.glob("docs/course/[1-7]_*.md"))]


def cells(kind):
    notebook = nbformat.reads(build(), as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == kind]


def test_the_notebook_is_built_from_the_chapters_as_they_are():
    """Outputs apart: whoever runs it and saves it has outputs of his own."""
    sources = lambda text: [(c.cell_type, c.source) for c in nbformat.reads(text, 4).cells]
    again = "a chapter or the notebook has changed: python -m nanorlhf.course.notebook"
    assert sources(NOTEBOOK.read_text()) == sources(build()), again


def test_jupyter_can_read_it():
    nbformat.validate(nbformat.reads(build(), as_version=4))


def test_every_cell_and_every_command_with_an_output_can_be_run():
    """The first code cell is the notebook's own, and has no output."""
    first, *rest = cells("code")
    assert not first.outputs and all(len(cell.outputs) == 1 for cell in rest)
    commands = [cell for cell in rest if cell.source.startswith("!python ")]
    assert len(rest) - len(commands) == sum(text.count("<!-- runs -->") for text in CHAPTERS)
    shown = sum(len(re.findall(r"^```text$", text, re.M)) for text in CHAPTERS)
    assert len(rest) == shown and commands, "an output that no cell prints"


def test_what_the_chapters_say_and_promise_is_all_there():
    """Word for word, in their order, but for links, for `<!-- runs -->` and for the way to the
    chapters beside it."""
    words = lambda text: re.sub(r"\]\([^)\s]*\)|<!-- runs -->|```(text|python)?", "", text).split()
    way = re.compile(r"^.*\[The course\].*$", re.M)
    shown = []
    for cell in nbformat.reads(build(), as_version=4).cells[2:]:
        shown += words(re.sub(r"(?m)^!(?=python )", "", cell.source))
        shown += [word for output in cell.get("outputs", []) for word in words(output.text)]
    assert shown == [word for text in CHAPTERS for word in words(way.sub("", text))]


def test_links_and_pictures_lead_somewhere_from_docs():
    targets = [t for cell in cells("markdown") for t in re.findall(r"\]\(([^)\s]+)\)", cell.source)]
    assert any(t.startswith("course/") for t in targets) and any(".png" in t for t in targets)
    for target in targets:
        file = target.partition("#")[0]
        assert (NOTEBOOK.parent / file).is_file() and ".." not in file, target
