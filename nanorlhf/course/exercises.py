"""What an exercise is: a real function with a hole or a mistake in it, and a check of what a reader
makes of it. A check knows the usual mistakes by what they compute, and says which one it sees.

The text of an exercise is the docstring of its check: the title, the question, and paragraphs that
begin with Predict, Answer, Hint and Run. The function itself is quoted from the source.
"""

import ast
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from textwrap import dedent

import torch

from nanorlhf.config import die, note
from nanorlhf.machine.python_file import load_function, load_module, raised

HOLE = "raise NotImplementedError  # your lines stand here"
FILE = '''"""{text}

Predict: {predict}

When it is done: python -m nanorlhf exercise {number}    (--hint 1, --hint 2, --solution)
"""

{imports}

PREDICTION = ""  # yours, before you run anything


{stub}'''


class Wrong(Exception):
    """An answer is not right yet. The message says which mistake it looks like."""


@dataclass
class Exercise:
    number: str  # "4.1": the first exercise of chapter 4
    check: Callable  # check(answer) raises Wrong; None's answer is on paper
    function: Callable = None  # the real one, which is the solution; None: a question on paper
    hole: str = ""  # a regular expression of what is taken out of its source; "": all it does
    instead: str = HOLE  # what stands there: a hunt has a mistake

    @property
    def title(self):
        return self.check.__doc__.partition("\n")[0].rstrip(".")

    def question(self):
        """The title and all that stands before the prediction."""
        text = inspect.cleandoc(self.check.__doc__).partition("Predict: ")[0]
        return f"{self.number} {text.strip()}"

    def parts(self, name):
        """The paragraphs of the text that begin with `name`."""
        paragraphs = inspect.cleandoc(self.check.__doc__).split("\n\n")
        return [p.removeprefix(f"{name}: ") for p in paragraphs if p.startswith(f"{name}: ")]

    def source(self):
        return dedent(inspect.getsource(self.function))

    def stub(self):
        """The function as the reader gets it."""
        source = self.source()
        if self.hole:
            start, end = re.search(self.hole, source, re.DOTALL).span()
            return source[:start] + self.instead + source[end:]
        first = ast.parse(source).body[0].body[1].lineno  # behind the docstring
        return "\n".join([*source.splitlines()[: first - 1], f"    {self.instead}", ""])

    def imports(self):
        """What the function needs of its module, as lines of Python."""
        names = {node.id for node in ast.walk(ast.parse(self.source())) if type(node) is ast.Name}
        known, home = self.function.__globals__, self.function.__module__
        lines = ["import torch"]
        for name in sorted(names & known.keys() - {"torch", self.function.__name__}):
            of_module = inspect.ismodule(known[name]) and f"import {known[name].__name__} as {name}"
            source = getattr(known[name], "__module__", None) or home
            lines.append(of_module or f"from {source} import {name}")
        return "\n".join(lines)

    def file(self):
        """What is written for the reader to fill in."""
        texts = {
            "text": self.question(),
            "predict": self.parts("Predict")[0],
            "number": self.number,
        }
        return FILE.format(**texts, imports=self.imports(), stub=self.stub())


# ---- what checks are made of -------------------------------------------------------------------


def must(holds, message):
    if not holds:
        raise Wrong(message)


def near(a, b):
    """Whether two tensors have one shape and equal numbers, but for rounding."""
    a, b = torch.as_tensor(a).detach().double(), torch.as_tensor(b).detach().double()
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def compare(what, got, right, mistakes):
    """Wrong where `got` is not `right`; `mistakes` are {what to say: what it would be then}. Of
    several rows, what is shown is the first that differs."""
    must(got is not None, f"{what}: your function returns None")
    if near(got, right):
        return
    for message, wrong in mistakes.items():
        must(not near(got, wrong), message)
    got, right = torch.as_tensor(got).detach(), torch.as_tensor(right).detach()
    shapes = f"{tuple(got.shape)}, and should have {tuple(right.shape)}"
    must(got.shape == right.shape, f"{what} has the shape {shapes}")
    where = ""
    if got.dim() > 1:
        row = next(i for i in range(len(got)) if not near(got[i], right[i]))
        where, got, right = f" in row {row}", got[row], right[row]
    raise Wrong(f"{what}{where} is {brief(got)}, and should be {brief(right)}")


def brief(x):
    return (x.double().round(decimals=4) if x.is_floating_point() else x.int()).tolist()


def judge(exercise, path):
    """Check what stands in the reader's file. Exits 1 where it is not right yet."""
    answer = load_function(f"{path}:{exercise.function.__name__}", "exercise")
    prediction = str(getattr(load_module(path.resolve()), "PREDICTION", "")).strip()
    if not prediction:
        die(f"{path}: write into PREDICTION what you expect, before you know")
    try:
        exercise.check(answer)
    except NotImplementedError:
        die(f"{path}: the hole is still there")
    except Wrong as wrong:
        note(f"{exercise.number}, not yet: {wrong}")
        raise SystemExit(1) from None
    except Exception as error:  # the reader's code may raise anything
        die(f"{path}: {raised(error)}")
    path.with_suffix(".solved").touch()
    note(f"{exercise.number} ✓\nyou predicted: {prediction}")
    for name, label in (("Answer", "what happens"), ("Run", "run it")):
        for part in exercise.parts(name):
            note(f"{label}: {part}")
