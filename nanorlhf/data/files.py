"""Files and published data sets -> records, one dict each, with a source to name in messages."""

import ast
import csv
import gzip
import importlib
import json
import re
import zlib
from contextlib import suppress
from itertools import chain
from pathlib import Path

from nanorlhf.config import die, reason

MESSAGES = re.compile(r"\s*\[\s*\{\s*['\"](role|from)['\"]")  # how messages stored as text begin


def format_of(path):
    """What READERS goes by: ".jsonl" for "a/b.JSONL.gz", "hf:" for a data set on the Hub. Under any
    other suffix, what begins like records is JSON, and "" stands for plain text."""
    path = str(path)
    suffix = "hf:" if path.startswith("hf:") else Path(path.lower().removesuffix(".gz")).suffix
    suffix = {".ndjson": ".jsonl", ".tsv": ".csv"}.get(suffix, suffix)
    if suffix in READERS or not Path(path).is_file():
        return suffix
    with suppress(OSError, EOFError, zlib.error), unzipped(path) as file:
        start = file.read(1000).lstrip()
        if re.match(rb'(\xef\xbb\xbf)?(\[\s*)?\{\s*"', start):
            return ".json"
    return ""


def unzipped(path):
    with open(path, "rb") as file:
        is_zip = str(path).lower().endswith(".gz") or file.read(2) == b"\x1f\x8b"
    return (gzip.open if is_zip else open)(path, "rb")


def lines(path):
    """Yields (line number, line) of a text file, which may be zipped by gzip. A file that cannot be
    read, or with nothing but white space in it, exits 2."""
    empty, number = True, 0
    try:
        with unzipped(path) as file:
            for number, line in enumerate(file, 1):
                if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    die(f"{path}: UTF-16 text; save it as UTF-8")
                empty = empty and not line.strip()
                yield number, line.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        die(f"{path}:{number}: not UTF-8 text ({error.reason} at byte {error.start} of the line)")
    except (OSError, EOFError, zlib.error) as error:
        die(f"{path}: {reason(error)}")
    if empty:
        die(f"{path}: the file is empty")


def read_records(paths, columns=()):
    """Yields (source, record) for every record of the files, or data sets by their names
    hf:owner/name[/config][:split]. `columns` renames columns, each by "to=from". A null counts as
    an absent column."""
    renames = [column.partition("=")[::2] for column in columns]
    if not all(to and was for to, was in renames) or len(dict(renames)) < len(renames):
        die(f"--columns {' '.join(columns)}: needs to=from, each once, as in prompt=my_question")
    moved = {was for _, was in renames}
    for path in map(str, paths):
        empty = True
        read = READERS.get(format_of(path), _json_lines)
        for source, record in read(path):
            empty = False
            if not isinstance(record, dict):
                die(f"{source}: expected an object, found {type(record).__name__}")
            is_ours = "judgement_id" in record  # in which a text is a text, whatever it looks like
            record = {
                key: value if is_ours else messages_of(source, key, value)
                for key, value in record.items()
                if value is not None
            }
            for to, was in renames:
                if was not in record:
                    found = ", ".join(map(repr, record))
                    die(f"{source}: --columns {to}={was}: no column {was!r} among {found}")
            kept = {key: value for key, value in record.items() if key not in moved}
            yield source, kept | {to: record[was] for to, was in renames}
        if empty:
            die(f"{path}: no records in it")


def messages_of(source, key, value):
    """Lists of messages may be stored as text, in CSV always: as JSON, or as Python shows them."""
    if not isinstance(value, str) or not MESSAGES.match(value):
        return value
    for parse in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return parse(value)
    die(f"{source}: {key!r} holds messages as text that is neither JSON nor Python")


def _json_lines(path):
    for number, line in lines(path):
        if line.strip() in ("{", "["):  # an object over several lines
            yield from _json(path)
            return
        if line.strip():
            try:
                record = json.loads(line.strip().removesuffix(","))
            except (ValueError, RecursionError) as error:
                die(f"{path}:{number}: not JSON ({error})")
            yield f"{path}:{number}", record


def _json(path):
    """A list of objects, objects one after the other, or one that holds them all."""
    text = "".join(line for _, line in lines(path))
    between, decoder, values, number = re.compile(r"[\s,]*"), json.JSONDecoder(), [], 1
    at, until = 0, between.match(text).end()
    try:
        while until < len(text):
            number, at = number + text.count("\n", at, until), until
            value, until = decoder.raw_decode(text, at)
            values.append((f"{path}:{number}", value))
            until = between.match(text, until).end()
    except (ValueError, RecursionError) as error:
        die(f"{path}:{number}: not JSON ({error})")
    if len(values) == 1:
        values = [(f"{path}[{i}]", row) for i, row in enumerate(rows_of(values[0][1]))]
    yield from values


def rows_of(value):
    """The records in one JSON value: a list of them; columns, as lists or as pandas writes them; a
    list of them under a name; or else the value itself."""
    if not isinstance(value, dict):
        return value if isinstance(value, list) else [value]
    cells = list(value.values())
    if cells and all(
        isinstance(c, dict) and "0" in c and c.keys() == cells[0].keys() for c in cells
    ):
        cells = [list(c.values()) for c in cells]
    is_table = cells and all(isinstance(c, list) and len(c) == len(cells[0]) for c in cells)
    if is_table and not any(isinstance(x, dict) for c in cells for x in c):
        return [dict(zip(value, row)) for row in zip(*cells)]
    under = (value[key] for key in ("data", "rows", "train", "records", "examples") if key in value)
    return next((rows for rows in under if isinstance(rows, list)), [value])


def _csv(path):
    """The first line names the columns. A field in quotes may span several lines."""
    csv.field_size_limit(2**31 - 1)
    unnumbered = (line for _, line in lines(path))
    names = next(unnumbered)
    separator = max(",;\t", key=names.count)
    rows = csv.DictReader(chain([names], unnumbered), delimiter=separator, strict=True)
    try:
        for row in rows:
            source = f"{path}:{rows.line_num}"
            if None in row or None in row.values():
                die(f"{source}: not as many cells as the {len(rows.fieldnames)} columns")
            yield source, row
    except csv.Error as error:
        die(f"{path}:{rows.line_num}: not CSV ({error})")


def package(name, what, extra="datasets"):
    try:
        return importlib.import_module(name)
    except ImportError:
        die(f"{what}: needs {name}: pip install -e '.[{extra}]'")


def _parquet(path):
    parquet, pyarrow = package("pyarrow.parquet", path), package("pyarrow", path)
    try:
        with parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            for i, row in enumerate(rows):
                yield f"{path}[{i}]", row
    except (OSError, pyarrow.ArrowException) as error:
        die(f"{path}: {reason(error)}")


def _hub(spec):
    datasets = package("datasets", spec)
    name, _, split = spec.removeprefix("hf:").partition(":")
    owner, repo, config = [*name.split("/", 2), "", ""][:3]
    path, split = f"{owner}/{repo}", split or "train"
    try:
        try:
            records = datasets.load_dataset(path, config or None, split=split)
        except ValueError:  # no configuration of that name; HH-RLHF, for one, has folders instead
            if not config:
                raise
            records = datasets.load_dataset(path, data_dir=config, split=split)
    except Exception as error:  # whatever the network or the data set raises ends the same way
        die(f"{spec}: could not be loaded ({type(error).__name__}: {reason(error)})")
    for i, record in enumerate(records):
        yield f"{spec}[{i}]", record


READERS = {".json": _json, ".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet, "hf:": _hub}
