"""Bad input, swept: whatever a file, a folder or a flag holds, either it is read, or the program
ends with exit status 2 and one line that begins with "error: ". Never a traceback, never a hang,
and no input file is changed.

`make test` tries a small fixed share; `make fuzz` tries FUZZ inputs per test from a seed that it
prints, and SEED=... tries those again.
"""

import copy
import csv
import dataclasses
import gzip
import io
import itertools
import json
import math
import os
import pickle
import random
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis import strategies as st

import train_gpt
import train_ppo
import train_rm
import train_sft
from nanorlhf import judge_file
from nanorlhf.bpe import train_bpe
from nanorlhf.config import TrainConfig, from_cli
from nanorlhf.data import batches, dialogue
from nanorlhf.data.examples import load_demonstrations, load_feedback, load_prompts, read_texts
from nanorlhf.data.files import read_records, write_records
from nanorlhf.loading import load_gpt
from nanorlhf.run import checkpoint
from nanorlhf.run.log import Log
from nanorlhf.tokenizer import byte_tokenizer
from nanorlhf.tools import bench, chat, evaluate, export, memory, plot
from nanorlhf.tools import data as data_tool

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.filterwarnings("ignore")  # torch, of damaged pickles
FUZZ = int(os.environ.get("FUZZ", 0))
SEED = int(os.environ.get("SEED", random.SystemRandom().randrange(2**32)))
TRIED, REFUSED, FAILED = Counter(), Counter(), Counter()  # inputs, by reader
STAGES = {"gpt": train_gpt, "sft": train_sft, "rm": train_rm, "ppo": train_ppo}
TOOLS = (bench, chat, data_tool, evaluate, export, memory, plot)
LOADERS = {
    "texts": read_texts,
    "demonstrations": load_demonstrations,
    "prompts": load_prompts,
    "feedback": load_feedback,
}
FIXTURES = sorted((ROOT / "tests/fixtures").iterdir())
PROBE = "It's 42 °C,\n\n  isn't it?\t\x00 é🦊 "


def sweep(share=20, weight=1.0):
    """A test of `share` fixed inputs, or of FUZZ * weight new ones."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    checks += [HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much]
    n = max(1, int(FUZZ * weight)) if FUZZ else share
    chosen = settings(
        max_examples=n,
        derandomize=not FUZZ,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],  # a failing input is small already
        suppress_health_check=checks,
    )
    return lambda test: seed(SEED)(chosen(test)) if FUZZ else chosen(test)


class Hang(BaseException):
    """No Exception: nothing in the program may catch it."""


@contextmanager
def time_limit(seconds):
    def stop(*_):
        raise Hang(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def survives(reader, call, inputs=(), seconds=10):
    """(what call() returned, what it printed), or (None, its one line of error)."""
    TRIED[reader] += 1
    inputs = [p for p in map(Path, inputs) if p.is_file()]
    before = [p.read_bytes() for p in inputs]
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace"), io.StringIO()
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        with time_limit(seconds), redirect_stdout(out), redirect_stderr(err):
            try:
                found = call()
                out.seek(0)
                said = out.read()
            except SystemExit as end:
                lines = err.getvalue().splitlines()
                errors = [line for line in lines if not line.startswith("warning: ")]
                assert end.code == 2 and len(errors) == 1, (end.code, errors)
                assert errors[0].startswith("error: "), errors
                REFUSED[reader] += 1
                found, said = None, errors[0]
        assert [p.read_bytes() for p in inputs] == before, "an input has changed"
    except BaseException:
        FAILED[reader] += 1
        raise
    finally:
        signal.signal(signal.SIGINT, interrupt)
    return found, said


@pytest.fixture(scope="module", autouse=True)
def totals(request):
    """What was tried, said at the end."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    yield
    if FUZZ:
        plugins = request.config.pluginmanager
        say = plugins.getplugin("terminalreporter").write_line
        with plugins.getplugin("capturemanager").global_and_fixture_disabled():
            say("")
            for reader, n in sorted(TRIED.items()):
                counts = f"{n:7} inputs {REFUSED[reader]:7} refused {FAILED[reader]:3} failures"
                say(f"{reader:24} {counts}")
            say(
                f"{sum(TRIED.values())} inputs in {time.perf_counter() - start:.0f} s, "
                f"{sum(FAILED.values())} failures; SEED={SEED}"
            )


# ---- damage ------------------------------------------------------------------------------------

SPLINTERS = [
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\r",
    b"\r\n",
    b"\n",
    b'"',
    b",",
    b"{",
    b"]",
    b"\\ud800",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"9" * 5000,
    b"[" * 3000,
    b"null",
    b"<|endoftext|>\n",
    b"\n\nHuman:",
    b"\n\nAssistant:",
    b"### Human:",
    b"\xc3",
    b" " * 3000,
    b"PK\x03\x04",
    b"PAR1",
]
NASTY = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    7,
    10**9,
    2**31,
    2**63,
    10**30,
    10**400,
    0.5,
    -0.0,
    1e308,
    math.inf,
    math.nan,
    "",
    "x",
    "\ud800",
    "\x00",
    "1",
    "Infinity",
    "user",
    "assistant",
    [],
    {},
    [[]],
    [{}],
    [None],
    {"role": "user"},
    {"role": [], "content": "x"},
    [1, 2, 3],
    "\n\nHuman: a\n\nAssistant: b",
    " " * 3000,
    "../../etc/passwd",
    "BPE",
    "(",
    "a*",
    r"\p{L}+",
    r"(?i:a)|[^a]",
]


@st.composite
def damage(draw, content):
    """Bytes with one to three wounds: cut short, a bit flipped, something put in or taken out."""
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from("cut flip flip insert drop overwrite repeat".split()))
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        until = min(len(content), at + draw(st.integers(1, 40)))
        if kind == "cut":
            content = content[:at]
        elif kind == "flip" and content:
            flipped = content[at] ^ (1 << draw(st.integers(0, 7)))
            content = content[:at] + bytes([flipped]) + content[at + 1 :]
        elif kind == "insert":
            content = content[:at] + draw(st.sampled_from(SPLINTERS)) + content[at:]
        elif kind == "drop":
            content = content[:at] + content[until:]
        elif kind == "overwrite":
            content = content[:at] + draw(st.binary(max_size=12)) + content[until:]
        elif kind == "repeat":
            content = content[:until] + content[at:]
    return content


@st.composite
def mutation(draw, tree):
    """An object of JSON with one to three of its parts replaced, removed, doubled or renamed."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        holder, node = None, tree
        while isinstance(node, (dict, list)) and node and (holder is None or draw(st.booleans())):
            key = draw(
                st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node)))
            )
            holder, node = node, node[key]
        kind = draw(st.sampled_from("replace replace replace delete wrap double rename".split()))
        if holder is None or kind == "replace" and draw(st.integers(0, 30)) == 0:
            tree = copy.deepcopy(draw(st.sampled_from(NASTY)))
        elif kind == "delete":
            del holder[key]
        elif kind == "wrap":
            holder[key] = [node]
        elif kind == "double" and isinstance(holder, list):
            holder.append(copy.deepcopy(node))
        elif kind == "rename" and isinstance(holder, dict):
            holder[draw(st.sampled_from(["", "x", "prompt", "text", "label", key + " "]))] = node
        else:
            holder[key] = copy.deepcopy(draw(st.sampled_from(NASTY)))
    return tree


# ---- text and records --------------------------------------------------------------------------

ASK = [{"role": "user", "content": "q"}]
SAY = [{"role": "assistant", "content": "a"}]
HH = "\n\nHuman: q\n\nAssistant:"
OWN = [
    {"text": "once upon a time", "label": 1},
    {"prompt": "q", "completion": "a"},
    {"prompt": ASK, "completion": SAY},
    {"messages": [{"role": "system", "content": "s"}, *ASK, *SAY]},
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"chosen": ASK + SAY, "rejected": ASK + [{"role": "assistant", "content": "b"}]},
    {"chosen": HH + " a", "rejected": HH + " b"},
    {"prompt": "q", "completions": ["a", "b", "c"], "ranks": [2, 1, 2]},
    {"prompt": "q", "completion": "a", "rating": 3.5, "labeler": "l"},
    {"prompt": "q", "completion": "a", "label": True},
    {"prompt": "q"},
    {"prompt": ASK, "completion": SAY + ASK + SAY, "system": "s", "history": [["q", "a"]]},
    {"prompt": HH, "chosen": SAY + ASK + SAY, "rejected": SAY, "labeler": 7},
    {"instruction": "q", "input": 7, "output": "a", "label": 1.0},
]


def published(path):
    """The records of a fixture."""
    if path.suffix == ".csv":
        return list(csv.DictReader(path.open()))
    text = path.read_text()
    return json.loads(text) if text.lstrip()[0] == "[" else list(map(json.loads, text.splitlines()))


RECORDS = [[record] for record in OWN] + [published(path)[:3] for path in FIXTURES]


def encoded(records, suffix):
    """The bytes of a file of records; None where the format cannot hold them."""
    if suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        file = io.BytesIO()
        try:
            parquet.write_table(pyarrow.Table.from_pylist(records), file)
        except (pyarrow.ArrowException, ValueError, TypeError, OverflowError, AttributeError):
            return None
        return file.getvalue()
    if suffix.startswith(".csv"):
        file = io.StringIO()
        names = list(dict.fromkeys(k for r in records if isinstance(r, dict) for k in r))
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(r for r in records if isinstance(r, dict))
        content = file.getvalue().encode(errors="surrogatepass")
    elif suffix.startswith(".jsonl"):
        content = "".join(json.dumps(r) + "\n" for r in records).encode()
    else:
        content = json.dumps(records, indent=1).encode()
    return gzip.compress(content, 1, mtime=0) if suffix.endswith(".gz") else content


SUFFIXES = [".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def use(loader, path, columns=()):
    """Read a file as a stage does, up to its batches of tensors."""
    found, tokenizer = LOADERS[loader]([path], columns), byte_tokenizer()
    if loader == "texts":
        found = list(found)
        ids = [tokenizer.encode(text) for _, text in found]
        assert [tokenizer.decode(row) for row in ids] == [whole(text) for _, text in found]
    elif loader == "demonstrations":
        rows = dialogue.encode_demonstrations(tokenizer, found, 512)
        batches.dialogue_batch(rows, range(len(rows)), tokenizer.pad_id)
    elif loader == "prompts":
        dialogue.encode_prompts(tokenizer, found, 64)
    else:
        assert found[0] in ("rankings", "ratings", "thumbs")
        rows = dialogue.encode_feedback(tokenizer, found[1], 512)
        batch = batches.feedback_batch(rows, range(len(rows)), tokenizer.pad_id)
        assert batch["target"].isfinite().all()
    return found


def whole(text):
    """Lone surrogates cannot be encoded; pairs of them are one character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@given(st.data())
@sweep(90, 5)
def test_records_of_any_kind_with_parts_replaced_are_read_or_refused(folder, draw):
    records = draw.draw(mutation(draw.draw(st.sampled_from(RECORDS))))
    suffix, loader = draw.draw(st.sampled_from(SUFFIXES)), draw.draw(st.sampled_from([*LOADERS]))
    records = records if isinstance(records, list) or suffix == ".json" else [records]
    try:
        content = encoded(records, suffix)
    except (TypeError, ValueError, csv.Error, AttributeError):
        return
    if content is not None:
        path = folder / f"records{suffix}"
        path.write_bytes(content)
        survives(f"{loader} {suffix}", lambda: use(loader, path), [path])


@given(st.data())
@sweep(80, 4)
def test_damaged_files_of_records_are_read_or_refused(folder, draw):
    records = draw.draw(st.sampled_from(RECORDS))
    suffix, loader = draw.draw(st.sampled_from(SUFFIXES)), draw.draw(st.sampled_from([*LOADERS]))
    content = encoded(records, suffix)
    assume(content is not None)
    path = folder / f"damaged{suffix}"
    path.write_bytes(draw.draw(damage(content)))
    found, _ = survives(f"{loader} {suffix}", lambda: use(loader, path), [path])
    if found is not None and suffix.endswith(".gz"):  # its checksum is of the contents alone
        if path.read_bytes()[: len(content)] != content:
            path.write_bytes(content)
            assert found == use(loader, path), "damaged data taken for whole"


@given(st.data())
@sweep(25)
def test_a_file_that_was_cut_short_gives_a_part_of_its_records_and_no_others(folder, draw):
    records = draw.draw(st.sampled_from(RECORDS))
    suffix = draw.draw(st.sampled_from([".jsonl", ".json", ".parquet", ".jsonl.gz"]))
    content, path = encoded(records, suffix), folder / f"cut{suffix}"
    assume(content is not None)
    path.write_bytes(content[: draw.draw(st.integers(0, len(content) - 1))])
    records = lambda: [record for _, record in read_records([path])]
    found, _ = survives(f"cut {suffix}", records, [path])
    if found is not None:
        assert suffix == ".jsonl" or path.read_bytes().rstrip() == content.rstrip()
        path.write_bytes(content)
        assert found == records()[: len(found)]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(st.lists(TEXT, min_size=1, max_size=4), st.sampled_from(["\n", "\r\n"]), st.booleans())
@sweep(20)
def test_any_text_comes_back_as_it_was_written(folder, texts, newline, bom):
    """NULs, lone carriage returns, marks of byte order within a line, separators of any kind."""
    texts = [t.replace("\r\n", "\n").strip("\r\n\ufeff") for t in texts]
    texts = [t for t in texts if t.strip() and "<|endoftext|>" not in t and "\n\ufeff" not in t]
    lines = "\n<|endoftext|>\n".join(texts).replace("\r\n", "\n").replace("\n", newline)
    for name in ("whole.txt", "whole.txt.gz"):
        content = b"\xef\xbb\xbf" * bom + lines.encode()
        path = folder / name
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        found, said = survives("texts .txt", lambda p=path: use("texts", p), [path])
        if texts:
            assert [text for _, text in found] == [t.replace("\r\n", "\n") for t in texts], said


@given(st.data())
@sweep(20, 2)
def test_damaged_text_is_read_or_refused(folder, draw):
    content = "One.\nTwo é.\n<|endoftext|>\nThree\r\n\r\n<|endoftext|>\n🦊 four\n".encode()
    zipped, again = draw.draw(st.booleans()), draw.draw(st.booleans())
    content = draw.draw(damage(content))
    content = gzip.compress(content, 1) if zipped else content
    content = draw.draw(damage(content)) if again else content
    path = folder / ("damaged.txt.gz" if zipped else "damaged.txt")
    path.write_bytes(content)
    survives("texts .txt", lambda: use("texts", path), [path])
    survives("tools.data", lambda: look(path), [path])


def look(path, *flags):
    return data_tool.main(from_cli(data_tool.Config, [str(path), "--init", "out/gpt", *flags]))


LONG = {
    "letters": "ab" * 2 * 10**5,
    "spaces": " " * 10**6 + "x",
    "newlines": "\n\t" * 10**6,
    "marks": "### Human:" + " " * 10**5 + "x",
    "random": None,
}


@pytest.mark.parametrize("kind", LONG)
def test_an_enormous_line_is_read_and_encoded_in_seconds(folder, kind):
    rng = random.Random(1)
    text = LONG[kind] or "".join(rng.choices("abcdefghijklmnop", k=2 * 10**4))
    path = folder / "long.jsonl"
    path.write_text(json.dumps({"text": text}) + "\n")
    assert survives("long lines", lambda: use("texts", path), [path], seconds=5)[0]
    train = lambda: train_bpe([text], 400)
    tokenizer, _ = survives("long lines", train, [], seconds=10)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.data())
@sweep(20, 2)
def test_columns_are_renamed_or_refused(folder, draw):
    path = folder / "columns.jsonl"
    records = draw.draw(st.sampled_from(RECORDS))
    path.write_bytes(encoded(records, ".jsonl"))
    names = [*map(str, records[0]), "prompt", "completion", "chosen", "rejected", "", "x=y", "\n"]
    side = st.sampled_from(names)
    word = st.one_of(st.builds("{}={}".format, side, side), st.text(max_size=5), side)
    columns = draw.draw(st.lists(word, min_size=1, max_size=3))
    loader = draw.draw(st.sampled_from([*LOADERS]))
    found, said = survives("--columns", lambda: use(loader, path, columns), [path])
    if found is not None:
        assert all("=" in column and column.split("=")[0] for column in columns), said


@given(st.data())
@sweep(20, 2)
def test_the_data_tool_shows_or_refuses_any_file(folder, draw):
    suffix = draw.draw(st.sampled_from(SUFFIXES))
    records = draw.draw(st.sampled_from(RECORDS))
    if draw.draw(st.booleans()):
        records = draw.draw(mutation(records))
    try:
        content = encoded(records if isinstance(records, list) else [records], suffix)
    except (TypeError, ValueError, csv.Error, AttributeError):
        return
    path = folder / f"tool{suffix}"
    path.write_bytes(content or b"")
    stage = draw.draw(st.sampled_from(["", "gpt", "sft", "rm", "ppo"]))
    survives("tools.data", lambda: look(path, "--stage", stage), [path])


# ---- flags -------------------------------------------------------------------------------------

CONFIGS = {f"train_{name}": module.Config for name, module in STAGES.items()}
CONFIGS |= {tool.__name__.split(".")[-1]: tool.Config for tool in TOOLS}
NUMBERS = [
    (name, field)
    for name, config in CONFIGS.items()
    for field in dataclasses.fields(config)
    if type(field.default) in (int, float)
]
WORDS = [
    "",
    "x",
    "-1",
    "0",
    "1",
    "0.5",
    "nan",
    "-nan",
    "inf",
    "-inf",
    "1e400",
    "-1e400",
    "1e-400",
    str(10**30),
    str(-(10**30)),
    "9" * 5000,
    "1_0",
    "٣",
    " 1",
    "0x10",
    "True",
    "\ud800",
    "\n",
    "-",
    "=",
    "1e9",
    str(2**32),
    "é" * 300,
]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_number_that_is_negative_zero_nan_or_huge_is_refused_where_it_makes_no_sense(name):
    fields = [field for n, field in NUMBERS if n == name]
    pairs = itertools.product(fields, WORDS)
    for field, word in list(pairs) if FUZZ else list(pairs)[::5]:
        given = lambda f=field, w=word: from_cli(CONFIGS[name], [f"--{f.name}={w}"])
        found, said = survives("flags", given)
        low, high = field.metadata["range"]
        if found is None:
            assert f"--{field.name}" in said
        else:
            value = getattr(found, field.name)
            assert math.isfinite(value) and low <= value <= high, (field.name, word)
    for field in fields:
        low, high = field.metadata["range"]
        assert low <= field.default <= high, field.name


@given(st.data())
@sweep(20, 2)
def test_any_words_are_flags_or_refused(draw):
    config = draw.draw(st.sampled_from([*CONFIGS.values()]))
    flags = ["--" + field.name for field in dataclasses.fields(config)] + ["--no-resume", "-h1"]
    word = st.one_of(
        st.sampled_from(flags),
        st.sampled_from(WORDS),
        st.text(max_size=6),
        st.builds("{}={}".format, st.sampled_from(flags), st.sampled_from(WORDS)),
    )
    argv = draw.draw(st.lists(word, max_size=6))
    if not {"-h", "--help"} & set(argv) and not any(w.startswith("-h") for w in argv):
        survives("flags", lambda: from_cli(config, argv))


PLAIN = {"device": "cpu", "dtype": "float32", "max_steps": 2, "eval_every": 1, "save_every": 2}
SMALL = {
    "gpt": {
        "data": "TEXT",
        "tokenizer": "bytes",
        "n_layer": 1,
        "n_head": 1,
        "d_model": 8,
        "block_size": 32,
        "batch_size": 2,
        "sample_tokens": 2,
    },
    "sft": {"data": "DEMOS", "init": "GPT", "batch_size": 2, "max_new_tokens": 2},
    "rm": {"data": "PAIRS", "init": "SFT", "batch_size": 2},
    "ppo": {
        "data": "PROMPTS",
        "init": "SFT",
        "reward": "RM",
        "batch_size": 4,
        "minibatch_size": 2,
        "max_new_tokens": 4,
        "eval_prompts": 2,
        "ptx_coef": 0.1,
        "ptx_data": "TEXT",
    },
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """{name: path} of small files of data, and of the four stages trained on them for 2 steps."""
    folder = tmp_path_factory.mktemp("toy")
    ask = [f"write {i}" for i in range(30)]
    records = {
        "TEXT": [{"text": f"{p} and {p[::-1]}, said the fox"} for p in ask],
        "DEMOS": [{"prompt": p, "completion": "ab"} for p in ask],
        "PAIRS": [{"prompt": p, "chosen": "ab", "rejected": "ba"} for p in ask],
        "PROMPTS": [{"prompt": p} for p in ask],
    }
    found = {k: write_records(folder / f"{k}.jsonl", r) for k, r in records.items()}
    found |= {stage.upper(): str(folder / stage) for stage in STAGES}
    for stage in STAGES:
        with redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")):
            run(found, stage, f"--out_dir={folder / stage}")
    return found


def run(toy, stage, *more):
    """A stage on the toy data with its small sizes, by its command line. `more` comes first."""
    given = {flag.partition("=")[0].removeprefix("--") for flag in more}
    flags = {k: v for k, v in (PLAIN | SMALL[stage]).items() if k not in given}
    argv = [f"--{k}={toy.get(v, v) if isinstance(v, str) else v}" for k, v in flags.items()]
    return STAGES[stage].main(from_cli(STAGES[stage].Config, [*argv, *more]))


RUNS = [
    (stage, field.name, value)
    for stage, module in STAGES.items()
    for field in dataclasses.fields(module.Config)
    if type(field.default) in (int, float)
    for value in dict.fromkeys([field.metadata["range"][0], 1, 3])
    if field.metadata["range"][0] <= value <= field.metadata["range"][1]
    and field.name not in ("max_steps", "documents", "demonstrations", "prompts")
]


@pytest.mark.parametrize("stage", STAGES)
def test_the_least_number_that_a_flag_takes_runs_or_is_refused(toy, folder, stage):
    for _, name, value in [r for r in RUNS if r[0] == stage][:: 1 if FUZZ else 9]:
        flag = f"--{name}={value}"
        survives(f"train_{stage}", lambda f=flag: run(toy, stage, f, f"--out_dir={folder}/{stage}"))


@pytest.mark.slow
@given(st.data())
@sweep(3, 0.4)
def test_a_stage_runs_or_refuses_any_flags_that_are_taken_by_themselves(toy, folder, draw):
    stage = draw.draw(st.sampled_from([*STAGES]))
    argv = []
    for field in dataclasses.fields(STAGES[stage].Config):
        if draw.draw(st.integers(0, 5)) == 0 and field.name not in ("max_steps", "d_model"):
            low, high = field.metadata["range"]
            if field.metadata["choices"]:
                argv.append(
                    f"--{field.name}={draw.draw(st.sampled_from(field.metadata['choices']))}"
                )
            elif type(field.default) is bool and field.name != "shard":
                argv.append("--" + field.name)
            elif type(field.default) is int:
                argv.append(f"--{field.name}={draw.draw(st.integers(low, min(high, low + 40)))}")
            elif type(field.default) is float:
                some = [low, high, 0.5, 1.0, 1e-3, 30.0, 1e6]
                value = draw.draw(st.sampled_from([x for x in some if low <= x <= high]))
                argv.append(f"--{field.name}={value}")
    start = lambda: run(toy, stage, *argv, f"--out_dir={folder}/any_{stage}")
    survives(f"train_{stage}", start, seconds=60)  # it may be told to make many passes


PLACES = [
    "--device=meta",
    "--device=",
    "--device=cuda:99999999999999999999",
    "--device=privateuseone",
    "--device=xla",
    "--device=\ud800",
    "--data=FOLDER",
    "--data=",
    "--out_dir=FILE",
    "--out_dir=FILE/below",
    "--out_dir=/proc/nothing",
    "--init=FILE",
    "--init=",
    "--val_data=gone.txt",
    "--columns=x",
    "--init=FOLDER",
    "--init=hf:no/such/thing",
    "--data=FOLDER/\n.jsonl",
    "--init=FOLDER/\n",
    "--data=hf:",
]


@pytest.mark.parametrize("stage", STAGES)
def test_a_place_or_device_that_is_not_there_is_refused(toy, folder, stage, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    inputs = [p for p in Path(toy["TEXT"]).parent.rglob("*") if p.is_file()]
    for flag in PLACES:
        if flag == "--init=" and stage == "gpt":
            continue  # its default: from scratch
        flag = flag.replace("FOLDER", str(folder)).replace("FILE", toy["TEXT"])
        argv = [flag] if flag.startswith("--out_dir") else [flag, f"--out_dir={folder}/{stage}"]
        _, said = survives("places", lambda a=argv: run(toy, stage, *a), inputs)
        assert said.startswith("error: "), f"{flag} was taken"


# ---- checkpoints -------------------------------------------------------------------------------


class Bomb:
    """What a pickle would run when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def copied(toy, stage, folder):
    """A fresh copy of a stage's folder, and its newest checkpoint in it."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(toy[stage], folder)
    return folder, checkpoint.find(folder, "latest")


def try_out(stage, folder):
    """Load a checkpoint as the next stage does and run it."""
    loader = partial(checkpoint.load_model, kind="reward") if stage == "RM" else load_gpt
    model, found = loader(folder)
    with torch.no_grad():
        model.eval()(torch.tensor([found.tokenizer.encode(PROBE)[:8]]))
    assert found.tokenizer.decode(found.tokenizer.encode(PROBE)) == PROBE
    return found


TENSORS = [
    None,
    0,
    "x",
    [],
    {},
    [1, 2],
    torch.zeros(0),
    torch.zeros(3),
    torch.zeros(8, 8).int(),
    torch.zeros(260, 8, dtype=torch.complex64),
    torch.zeros(32, 8, dtype=torch.bool),
    torch.nn.Parameter(torch.zeros(32, 8)),
    torch.zeros(1).expand(32, 8),
]


def corrupt(draw, weights):
    """Weights or a state, one to three of whose parts are replaced, removed or renamed."""
    weights = copy.deepcopy(weights)
    for _ in range(draw.draw(st.integers(1, 3))):
        holder = weights
        while True:
            key = draw.draw(
                st.sampled_from(
                    list(holder) if isinstance(holder, dict) else list(range(len(holder)))
                )
            )
            inner = holder[key]
            if not isinstance(inner, (dict, list)) or not inner or draw.draw(st.booleans()):
                break
            holder = inner
        kind = draw.draw(st.sampled_from(["replace", "remove", "rename"]))
        if kind != "replace":
            holder.pop(key)
        if kind == "rename" and isinstance(holder, dict):
            holder[draw.draw(st.sampled_from(["x", 7, None]))] = inner
        if kind == "replace":
            holder[key] = copy.deepcopy(draw.draw(st.sampled_from(TENSORS)))
        if not weights:
            break
    return draw.draw(st.sampled_from(TENSORS)) if draw.draw(st.integers(0, 9)) == 0 else weights


@given(st.data())
@sweep(50, 5)
def test_a_damaged_checkpoint_is_refused_or_works(toy, folder, draw):
    """Bytes that are damaged, other sizes, another vocabulary, weights that are none."""
    stage = draw.draw(st.sampled_from(["GPT", "RM", "PPO"]))
    copy, step = copied(toy, stage, folder / "checkpoint")
    path = step / draw.draw(st.sampled_from(["config.json", "weights.pt", "tokenizer.json"]))
    kind = draw.draw(st.sampled_from(["bytes", "parts", "sizes"]))
    if kind == "bytes":
        path.write_bytes(draw.draw(damage(path.read_bytes())))
    elif path.suffix == ".pt":
        torch.save(corrupt(draw, torch.load(path)), path)
    else:
        tree = json.loads(path.read_text())
        if kind == "sizes" and path.name == "config.json":
            tree["model"] = draw.draw(mutation(tree["model"]))
        else:
            tree = draw.draw(mutation(tree))
        path.write_text(json.dumps(tree))
    survives("checkpoints", lambda: try_out(stage, copy), step.iterdir())


@pytest.mark.parametrize("name", ["weights.pt", "state.pt", "pytorch_model.bin"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(toy, hf, folder, name):
    mark = folder / "ran"
    place = copied(toy, "SFT", folder / "bomb")
    if name == "pytorch_model.bin":
        place = [shutil.copytree(hf, folder / "hf_bomb", dirs_exist_ok=True)] * 2
        (place[0] / "model.safetensors").unlink(missing_ok=True)
    for protocol in (0, 2, 4, None):
        bomb = {"wte.weight": Bomb(mark), "optimizer": Bomb(mark)}
        if protocol is None:
            torch.save(bomb, place[1] / name)
        else:
            (place[1] / name).write_bytes(pickle.dumps(bomb, protocol))
        again = lambda: run(toy, "sft", f"--out_dir={place[0]}", "--resume", "--max_steps=3")
        call = again if name == "state.pt" else lambda: try_out("SFT", place[0])
        found, said = survives("pickles", call, [place[1] / name])
        assert found is None and not mark.exists(), said


@given(st.data())
@sweep(4, 0.3)
def test_a_run_does_not_go_on_from_a_damaged_state(toy, folder, draw):
    stage = draw.draw(st.sampled_from(["sft", "ppo"]))
    copy, step = copied(toy, stage.upper(), folder / f"resumed_{stage}")
    path = step / "state.pt"
    path.write_bytes(draw.draw(damage(path.read_bytes())))
    steps = json.loads((step / "config.json").read_text())["step"] + 1
    go_on = lambda: run(toy, stage, f"--out_dir={copy}", "--resume", f"--max_steps={steps}")
    survives("--resume", go_on)


# ---- Hugging Face folders ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def hf(toy, tmp_path_factory):
    """A folder that export writes, its weights also as .bin, its vocabulary in both layouts."""
    to = tmp_path_factory.mktemp("hf") / "model"
    with redirect_stdout(io.StringIO()):
        export.main(export.Config(toy["SFT"], str(to)))
    from safetensors.torch import load_file

    torch.save(load_file(to / "model.safetensors"), to / "pytorch_model.bin")
    tokenizer = json.loads((to / "tokenizer.json").read_text())["model"]
    (to / "vocab.json").write_text(json.dumps(tokenizer["vocab"]))
    merges = "".join(f"{a} {b}\n" for a, b in tokenizer["merges"])
    (to / "merges.txt").write_text("#version: 0.2\n" + merges)
    index = {"weight_map": {"transformer.wte.weight": "model.safetensors"}}
    (to / "index").write_text(json.dumps(index))
    return to


@given(st.data())
@sweep(40, 3)
def test_a_damaged_hugging_face_folder_is_refused_or_works(hf, folder, draw):
    place = folder / "hf"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(hf, place)
    if draw.draw(st.booleans()):
        (place / "model.safetensors").unlink()
    elif draw.draw(st.integers(0, 3)) == 0:
        (place / "index").rename(place / "model.safetensors.index.json")
    if draw.draw(st.integers(0, 3)) == 0:
        (place / "tokenizer.json").unlink()
    left = sorted(p for p in place.iterdir() if p.suffix not in (".md", ""))
    path = draw.draw(st.sampled_from(left))
    if path.suffix == ".json" and draw.draw(st.integers(0, 3)):
        path.write_text(json.dumps(draw.draw(mutation(json.loads(path.read_text())))))
    elif path.suffix == ".bin" and draw.draw(st.booleans()):
        torch.save(corrupt(draw, torch.load(path)), path)
    else:
        path.write_bytes(draw.draw(damage(path.read_bytes())))
    survives("Hugging Face folders", lambda: try_out("SFT", place), place.iterdir())


# ---- reward functions --------------------------------------------------------------------------

REWARDS = {
    "raises": "def f(p, r): raise RuntimeError('two\\nlines')",
    "raises nothing to say": "def f(p, r): raise ValueError",
    "asserts": "def f(p, r): assert len(r) > 99",
    "divides": "def f(p, r): return [1 / 0 for _ in r]",
    "is lazy and raises": "def f(p, r):\n    yield 1.0\n    raise KeyError('x')",
    "recurses": "def f(p, r): return f(p, r)",
    "returns None": "def f(p, r): pass",
    "returns a number": "def f(p, r): return 1.0",
    "returns text": "def f(p, r): return 'x' * len(r)",
    "returns too few": "def f(p, r): return [1.0] * (len(r) - 1)",
    "returns too many": "def f(p, r): return [1.0] * (len(r) + 1)",
    "returns nan": "def f(p, r): return [float('nan')] * len(r)",
    "returns inf": "def f(p, r): return [float('inf')] * len(r)",
    "returns more than float32 holds": "def f(p, r): return [1e300] * len(r)",
    "returns more than a float holds": "def f(p, r): return [10 ** 400] * len(r)",
    "returns complex numbers": "def f(p, r): return [1j] * len(r)",
    "returns lists": "def f(p, r): return [[1.0, 2.0]] * len(r)",
    "returns a table": "import torch\ndef f(p, r): return torch.zeros(len(r), 2)",
    "is a class": "class f:\n    def __init__(self, p, r): pass",
    "takes one argument": "def f(p): return p",
    "takes none": "f = lambda: 1",
    "is no function": "f = 3",
    "is not there": "g = 3",
    "fails to be imported": "import nothing_of_this_name",
    "raises at import": "1 / 0",
    "is no Python": "def f(:",
    "holds a NUL": "f = 1\x00",
    "is not UTF-8": "f = '\udcff'",
    "exits": "def f(p, r): exit(0)",
    "exits at import": "import sys\nsys.exit()",
    "interrupts nothing": "def f(p, r): raise StopIteration",
}
FINE = {
    "returns a tensor": "import torch\ndef f(p, r): return torch.ones(len(r), requires_grad=True)",
    "returns integers": "def f(p, r): return [len(x) for x in r]",
    "is lazy": "def f(p, r): return (1.0 for x in r)",
    "empties what it is given": "def f(p, r):\n    n = len(r)\n    p.clear()\n    r.clear()\n"
    "    return [1.0] * n",
    "prints": "def f(p, r):\n    print('\\ud800', *r)\n    return [1.0] * len(r)",
}


@pytest.mark.parametrize("name", [*REWARDS, *FINE])
def test_a_reward_function_gives_scores_or_one_line_of_error(toy, folder, name):
    path = folder / f"{name}.py"
    source = (REWARDS | FINE)[name]
    path.write_bytes(source.encode(errors="surrogateescape"))
    asked = [dialogue.Prompt([1], "p", "f:1", {})]
    call = lambda f: judge_file.load_judge(f"{path}:f", f, asked)(asked, ["r"])
    if FUZZ or name in ("raises", "empties what it is given", "prints"):
        call = lambda f: run(toy, "ppo", f"{f}={path}:f", f"--out_dir={folder}/rewarded")
    for flag in ("--reward", "--gold"):
        found, said = survives("reward functions", lambda f=flag: call(f), [path])
        assert (found is None) == (name in REWARDS), said
        if name in ("raises", "divides", "raises at import"):
            assert f"{path}:1)" in said, said  # a person must find the line


@given(st.text(max_size=12), st.sampled_from(["--reward", "--gold"]))
@sweep(2, 0.1)
def test_a_reward_that_is_not_there_is_refused(toy, folder, word, flag):
    for spec in (word, f"{folder}/x.py:{word}", f"{word}.py:f", f"{folder}:f", f"{folder}.py:f"):
        spec = spec.replace("\x00", "")
        if spec or flag == "--reward":
            call = lambda s=spec: run(toy, "ppo", f"{flag}={s}", f"--out_dir={folder}/no_reward")
            assert survives("reward functions", call)[0] is None


# ---- tools and logs ----------------------------------------------------------------------------


@given(st.data())
@sweep(20)
def test_damaged_metrics_are_drawn_or_refused_and_cut_or_refused(toy, folder, draw):
    place = folder / "metrics"
    place.mkdir(exist_ok=True)
    content = Path(toy["SFT"], "metrics.csv").read_bytes()
    path = place / "metrics.csv"
    path.write_bytes(draw.draw(damage(content)))
    survives("metrics.csv", lambda: plot.read(place), [path])
    cfg = TrainConfig(out_dir=str(place))
    survives("metrics.csv", lambda: Log(cfg, 1, 2).close())


@given(st.data())
@sweep(6, 0.5)
def test_export_writes_or_refuses_a_folder_with_damaged_files_beside_the_model(toy, folder, draw):
    copy, step = copied(toy, "RM", folder / "exported")
    beside = [copy / "metrics.csv", copy / "report.json", step / "config.json"]
    for path in draw.draw(st.lists(st.sampled_from(beside), min_size=1)):
        content = path.read_bytes()
        path.write_bytes(draw.draw(damage(content)))
        if path.suffix == ".json" and draw.draw(st.booleans()):
            with suppress(ValueError):  # damaged before
                path.write_text(json.dumps(draw.draw(mutation(json.loads(content)))))
    inputs = [p for p in copy.rglob("*") if p.is_file()]
    to = draw.draw(st.sampled_from([folder / "to", step, copy / "hf", toy["TEXT"], "/proc/x"]))
    survives("export", lambda: export.main(export.Config(str(copy), str(to))), inputs)


@pytest.mark.parametrize("to", ["x.csv", "x", "/proc/x.png", "FILE/x.png", "FILE", "FOLDER"])
def test_a_picture_is_written_or_refused_and_replaces_nothing_else(toy, folder, to, monkeypatch):
    monkeypatch.chdir(folder)
    to = to.replace("FILE", toy["TEXT"]).replace("FOLDER", str(folder))
    flags = [f"--runs={toy['SFT']}", f"--to={to}"]
    survives("plot", lambda: plot.main(from_cli(plot.Config, flags)), [toy["TEXT"]])


@given(st.lists(st.binary(max_size=12), max_size=4), st.data())
@sweep(5, 0.3)
def test_the_chat_answers_or_refuses_any_bytes(toy, folder, lines, draw):
    stage = draw.draw(st.sampled_from(["GPT", "SFT", "PPO"]))
    numbers = {
        "temperature": [0.0, 0.01, 1e6],
        "top_k": [0, 1, 10**6],
        "top_p": [1e-6, 0.5, 1.0],
        "max_new_tokens": [1, 4, 31, 32],
        "seed": [0, 2**32 - 1],
    }
    flags = [f"--{k}={draw.draw(st.sampled_from(v))}" for k, v in numbers.items()]
    stdin = io.TextIOWrapper(io.BytesIO(b"\n".join(lines)), "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", stdin)
        call = lambda: chat.main(from_cli(chat.Config, [toy[stage], "--device=cpu", *flags]))
        survives("chat", call)


@given(st.data())
@sweep(3, 0.2)
def test_the_memory_tool_predicts_or_refuses(toy, folder, draw):
    copy, step = copied(toy, "GPT", folder / "predicted")
    config = json.loads((step / "config.json").read_text())
    if draw.draw(st.booleans()):
        config["model"] = draw.draw(mutation(config["model"]))
        (step / "config.json").write_text(json.dumps(config))
    else:
        (step / "config.json").write_bytes(draw.draw(damage((step / "config.json").read_bytes())))
    flags = [
        f"--init={copy}",
        "--stages",
        "gpt",
        "--device=cpu",
        "--prompt_tokens=8",
        "--max_new_tokens=8",
        f"--batch_size={draw.draw(st.integers(0, 3))}",
    ]
    survives("memory", lambda: memory.main(from_cli(memory.Config, flags)), seconds=20)


def test_evaluate_refuses_a_folder_that_mixes_up_stages_and_prompts_that_do_not_fit(toy, folder):
    out = folder / "out"
    for missing in ("gpt", "sft", "rm", "ppo"):
        shutil.rmtree(out, ignore_errors=True)
        for stage in STAGES:
            if stage != missing:
                shutil.copytree(toy[stage.upper()], out / stage)
        evaluate_it = lambda: evaluate.main(from_cli(evaluate.Config, [f"--out={out}"]))
        assert survives("evaluate", evaluate_it)[0] is None
        shutil.copytree(toy["RM" if missing != "rm" else "SFT"], out / missing)
        assert survives("evaluate", evaluate_it)[0] is None
