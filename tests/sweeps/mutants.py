"""Which changes to the code does no test notice?

    python -m tests.sweeps.mutants                                  # make mutants: every file below
    python -m tests.sweeps.mutants --files functional --match gae   # while writing a test
    python -m tests.sweeps.mutants --files ppo --sample 10 --seed 2 # ten of them, at random

One change at a time (a sign, a bound, a comparison, a mask, a constant, swapped arguments, a
removed statement) is made to a function, and the tests of its file run until one fails. A mutant
that all tests pass has survived: write the test that it shows to be missing, or explain it in
mutants_equivalent.txt, whose entries are

    FILE FUNCTION
    - the statement as it is, as ast.unparse prints it
    + the statement as mutated
    = why no test can tell them apart       (or "! why one process on a CPU cannot")

so neither comments nor line breaks matter. Of a compound statement (if, for, with, def) only the
head is shown.

Each mutant is a forked child of this process, which has imported torch: a start takes 0.3 s and
not 4. (mutmut leaves decorated functions alone, so all that is under torch.no_grad; cosmic-ray
starts a process each; neither inverts a mask or moves a bound.) Exits 1 if a mutant of
functional.py survives unexplained, or more than a tenth of another file's.
"""

import argparse
import ast
import copy
import gc
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from importlib.machinery import SourceFileLoader
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: a fork keeps no threads
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"

import hypothesis.strategies  # noqa: E402, F401
import numpy.random  # noqa: E402, F401
import pytest  # noqa: E402
import tiktoken  # noqa: E402, F401
import torch._dynamo  # noqa: E402, F401, what an optimizer imports when it first steps
import tqdm  # noqa: E402, F401
from hypothesis import Phase, settings  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
EXPLAINED = ROOT / "tests/sweeps/mutants_equivalent.txt"
TESTS = {
    "nanorlhf/functional.py": ["tests/test_functional.py"],
    "nanorlhf/fused.py": ["tests/test_fused.py"],
    "nanorlhf/sampling.py": ["tests/test_sampling.py"],
    "nanorlhf/data/batches.py": ["tests/data/test_batches.py", "tests/data/test_tokens.py"],
    "nanorlhf/data/dialogue.py": ["tests/data/test_dialogue.py"],
    "nanorlhf/rollout.py": ["tests/test_ppo_loop.py"],
    "train_ppo.py": ["tests/test_ppo_loop.py"],
}
OPERATORS = {
    "+": "-",
    "-": "+",
    "*": "/",
    "/": "*",
    "//": "/",
    "**": "*",
    "%": "*",
    "<<": ">>",
    "<": "<=,>",
    "<=": "<,>",
    ">": ">=,<",
    ">=": ">,<",
    "==": "!=",
    "!=": "==",
    "and": "or",
    "or": "and",
    "is": "is not",
    "is not": "is",
    "in": "not in",
    "+=": "-=,=",
    "-=": "+=,=",
    "|=": "&=,=",
    "|": "&",
    "&": "|",
}
NAMES = {
    "sum": "mean",
    "mean": "sum",
    "any": "all",
    "amax": "amin",
    "maximum": "minimum",
    "min": "max",
    "max": "min",
    "argmax": "argmin",
    "no_grad": "enable_grad",
    "zeros": "ones",
    "zeros_like": "ones_like",
    "reversed": "list",
    "exp": "expm1",
    "expm1": "exp",
    "rsqrt": "sqrt",
    "square": "abs",
    "sign": "abs",
}
COMMUTE = {"min", "max", "minimum", "maximum"}


@dataclass
class Mutant:
    file: str
    function: str
    old: str  # the statement that changes, as ast.unparse prints it
    new: str
    code: object = field(repr=False)

    @property
    def key(self):
        return self.file, self.function, self.old, self.new

    def __str__(self):
        return f"{self.file} {self.function}\n- {self.old}\n+ {self.new}"


class Source:
    """A file's text, and where the nodes of its syntax tree lie in it."""

    def __init__(self, text):
        self.text = text.encode()  # ast counts bytes
        self.starts = [0]
        for line in self.text.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        tree = ast.walk(ast.parse(text))
        aliases = [a for n in tree if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names]
        self.modules = {alias.asname or alias.name for alias in aliases}

    def span(self, node):
        start = self.starts[node.lineno - 1] + node.col_offset
        return start, self.starts[node.end_lineno - 1] + node.end_col_offset

    def of(self, node):
        start, end = self.span(node)
        return self.text[start:end].decode()

    def between(self, left, right):
        """Edits of the operator that stands between two nodes."""
        start, end = self.span(left)[1], self.span(right)[0]
        gap = self.text[start:end].decode()
        symbol = re.sub(r"\s*#.*", "", gap).strip(" ()\n\\")
        for other in OPERATORS[symbol].split(",") if symbol in OPERATORS else ():
            yield start, end, gap.replace(symbol, other, 1)


def edits(source, node):
    """(start, end, what to write there instead), for every mutation of this node itself."""
    span, of = source.span, source.of
    if isinstance(node, ast.BinOp):
        yield from source.between(node.left, node.right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitOr, ast.BitAnd)):
        yield from ((*span(node), of(side)) for side in (node.left, node.right))
    if isinstance(node, ast.AugAssign):
        yield from source.between(node.target, node.value)
    if isinstance(node, ast.UnaryOp):
        yield *span(node), of(node.operand)
    if isinstance(node, ast.Compare):
        operands = [node.left, *node.comparators]
        for left, right in zip(operands, operands[1:]):
            yield from source.between(left, right)
    if isinstance(node, ast.BoolOp):
        for left, right in zip(node.values, node.values[1:]):
            yield from source.between(left, right)
        word = " and " if isinstance(node.op, ast.And) else " or "
        for gone in node.values:
            yield *span(node), word.join(f"({of(v)})" for v in node.values if v is not gone)
    if isinstance(node, (ast.If, ast.IfExp, ast.While)):
        yield *span(node.test), f"(not ({of(node.test)}))"
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        for value in other_values(node.value):
            yield *span(node), repr(value)
    if isinstance(node, ast.Slice):
        for bound in filter(None, (node.lower, node.upper, node.step)):
            yield *span(bound), ""
            yield from by_one(source, bound)
    if isinstance(node, ast.Call):
        yield from of_a_call(source, node)
    if isinstance(node, ast.Name) and node.id in NAMES:
        yield *span(node), NAMES[node.id]
    if isinstance(node, ast.Attribute) and node.attr in NAMES:
        end = span(node)[1]
        yield end - len(node.attr), end, NAMES[node.attr]
    if isinstance(node, ast.keyword) and node.arg in ("min", "max"):
        start = span(node)[0]
        yield start, start + 3, NAMES[node.arg]
    statement = isinstance(node, (ast.Assign, ast.AugAssign, ast.Raise, ast.Break, ast.Continue))
    if statement or isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield *span(node), "pass"
    if isinstance(node, ast.If):
        for inner in node.body + node.orelse:
            if isinstance(inner, ast.Return):
                yield *span(inner), "pass"


def of_a_call(source, node):
    span, of = source.span, source.of
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    for a, b in zip(node.args, node.args[1:]) if name not in COMMUTE else ():
        gap = source.text[span(a)[1] : span(b)[0]].decode()
        yield span(a)[0], span(b)[1], of(b) + gap + of(a)
    if isinstance(node.func, ast.Attribute) and of(node.func.value) not in source.modules:
        yield *span(node), of(node.func.value)  # x.detach() -> x
    if name in ("range", "arange"):
        for bound in node.args:
            yield from by_one(source, bound)
    if name.startswith("masked_fill") and not of(node.args[0]).startswith("~"):
        yield *span(node.args[0]), f"~({of(node.args[0])})"


def by_one(source, bound):
    if not isinstance(bound, ast.Constant):  # that is mutated as a constant
        yield *source.span(bound), f"{source.of(bound)} + 1"
        yield *source.span(bound), f"{source.of(bound)} - 1"


def other_values(x):
    if isinstance(x, bool):
        return [not x]
    if isinstance(x, int):
        return [x + 1, x - 1]
    return [2 * x, round(1.1 * x, 12)] if x else [1.0]


def functions(tree):
    """(name, node) of a file's functions and methods; what is inside one belongs to it."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}.{n}", inner) for n, inner in functions(node))


def walk(node):
    """ast.walk, but not into f-strings: what they say is no matter, and where is not known."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.JoinedStr):
            yield from walk(child)


def mutants_of(file):
    text = (ROOT / file).read_text()
    source, tree = Source(text), ast.parse(text)
    seen = {ast.dump(tree)}
    for name, function in functions(tree):
        for node in walk(function):
            for start, end, instead in edits(source, node):
                changed = (source.text[:start] + instead.encode() + source.text[end:]).decode()
                try:
                    mutated = ast.parse(changed)
                except SyntaxError:  # a parenthesis was left over, or `pass` inside a lambda
                    continue
                if ast.dump(mutated) not in seen:
                    seen.add(ast.dump(mutated))
                    code = compile(mutated, str(ROOT / file), "exec")
                    yield Mutant(file, name, *difference(tree, mutated), code)


def difference(before, after):
    """The innermost statement that differs, as it is and as mutated; both trees have as many."""
    pairs = zip(statements(before), statements(after))
    *_, (old, new) = ((a, b) for a, b in pairs if ast.dump(a) != ast.dump(b))
    return head(old), head(new)


def statements(tree):
    """All of a file's, outer ones first."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.stmt))


def head(statement):
    """A statement on one line, without the statements inside it."""
    alone = copy.copy(statement)
    for inside in {"body", "orelse", "handlers", "finalbody"} & set(alone._fields):
        setattr(alone, inside, [])
    return " ".join(ast.unparse(alone).split())


class Order:
    """pytest, as a mutant needs it: likely killers first, no shrinking, and who failed."""

    def __init__(self, first, pipe):
        self.first, self.pipe = first, pipe

    def pytest_sessionstart(self):  # conftest.py has been read, the tests not yet
        phases = [Phase.explicit, Phase.generate]
        settings.register_profile("mutant", settings.default, phases=phases)
        settings.load_profile("mutant")

    def pytest_collection_modifyitems(self, items):
        place = {name: i for i, name in enumerate(self.first)}
        items.sort(key=lambda item: place.get(item.nodeid, len(place)))

    def pytest_runtest_logreport(self, report):
        if report.failed:
            os.write(self.pipe, report.nodeid.encode())


def child(mutant, folder, first, pipe, limit):
    """Run the tests with the mutant's code in place of its file's; exit 0 if it survives."""
    signal.alarm(limit)  # nobody catches it: an endless loop is a death
    resource.setrlimit(resource.RLIMIT_AS, (2**35, 2**35))
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nowhere, fd)
    path, get_code = str(ROOT / mutant.file), SourceFileLoader.get_code
    mutated = lambda self, name: mutant.code if self.path == path else get_code(self, name)
    SourceFileLoader.get_code = mutated
    flags = ["-x", "-p", "no:cacheprovider", "--tb=no", f"--basetemp={folder}"]
    os._exit(pytest.main([*flags, *TESTS[mutant.file]], plugins=[Order(first, pipe)]))


def run(mutants, jobs, limit):
    """Yields (mutant, whether it survived), as they end."""
    waiting, running, killers = mutants[::-1], {}, defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        while waiting or running:
            while waiting and len(running) < jobs:
                mutant, (read, write) = waiting.pop(), os.pipe()
                first = killers[mutant.function] + killers[mutant.file]
                folder = f"{scratch}/{len(waiting)}"
                if not (pid := os.fork()):
                    child(mutant, folder, list(dict.fromkeys(first)), write, limit)
                os.close(write)
                running[pid] = mutant, folder, read
            pid, status = os.wait()
            mutant, folder, read = running.pop(pid)
            killer = os.read(read, 10_000).decode()
            os.close(read)
            shutil.rmtree(folder, ignore_errors=True)
            for names in (killers[mutant.function], killers[mutant.file]) if killer else ():
                names[:] = [killer, *(n for n in names if n != killer)]
            yield mutant, status == 0


def explanations():
    """{key of a mutant: "= why it is equivalent" or "! why it cannot run here"}."""
    blocks = [b.splitlines() for b in EXPLAINED.read_text().split("\n\n")[1:] if b.strip()]
    return {(*b[0].split(), b[1][2:], b[2][2:]): b[3] for b in blocks}


def main():
    names = [Path(file).stem.removeprefix("train_") for file in TESTS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", nargs="+", default=names, choices=names)
    parser.add_argument("--match", default="", help="only functions whose name contains this")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--sample", type=int, default=0, help="so many of each file; 0: all")
    parser.add_argument("--seed", type=int, default=1, help="of --sample")
    args = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    gc.freeze()  # pytest's collections at its end need not look through torch
    why, failed = explanations(), False
    for file in (f for f, name in zip(TESTS, names) if name in args.files):
        began, counts = time.perf_counter(), Counter()
        code = compile((ROOT / file).read_text(), str(ROOT / file), "exec")
        ((_, passes),) = run([Mutant(file, "", "", "", code)], 1, 600)
        assert passes, f"{TESTS[file]} fail without any mutant"
        limit = 20 + 5 * int(time.perf_counter() - began)
        mutants = [m for m in mutants_of(file) if args.match in m.function]
        known = {m.key for m in mutants}
        gone = [k for k in why if k[0] == file and k not in known and args.match in k[1]]
        print("".join(f"listed, but no mutant any more: {k}\n" for k in gone), end="")
        if args.sample:
            mutants = random.Random(args.seed).sample(mutants, min(args.sample, len(mutants)))
        for mutant, survived in run(mutants, args.jobs, limit):
            reason = why.get(mutant.key, " ")
            kind = {"=": "equivalent", "!": "not on a CPU", " ": "survived"}[reason[0]]
            counts[kind if survived else "killed"] += 1
            if survived == (kind == "survived"):
                note = "" if survived else f"\nlisted as {kind}, but a test notices it"
                print(f"{mutant}{note}\n" if survived or reason != " " else "", end="", flush=True)
        minutes = (time.perf_counter() - began) / 60
        of = counts["killed"] + counts["survived"]
        shown = ", ".join(f"{n} {kind}" for kind, n in counts.most_common())
        killed = f"{counts['killed'] / max(of, 1):.1%} killed"
        print(f"{file}: {shown}; {killed}; {minutes:.1f} min", flush=True)
        failed |= counts["survived"] > (0 if "functional" in file else 0.1 * of)
    sys.exit(failed)


if __name__ == "__main__":
    main()
