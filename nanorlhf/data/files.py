"""Files and published data sets -> records, one dict each, with a source to name in messages."""

import csv
import gzip
import json
import zlib
from pathlib import Path

from nanorlhf.config import die, reason


def format_of(path):
    """What READERS goes by: ".jsonl" for "a/b.jsonl.gz", "hf:" for a data set on the Hub."""
    path = str(path)
    return "hf:" if path.startswith("hf:") else Path(path.removesuffix(".gz")).suffix


def lines(path):
    """Yields (line number, line) of a text file or a .gz of one. A file that cannot be read, or
    with nothing but white space in it, exits 2."""
    empty, number = True, 0
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
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
    if not all(to and was for to, was in renames):
        die(f"--columns {' '.join(columns)}: needs to=from, as in prompt=my_question")
    for path in map(str, paths):
        empty = True
        read = READERS.get(format_of(path), _json_lines)
        for source, record in read(path):
            empty = False
            if not isinstance(record, dict):
                die(f"{source}: expected an object, found {type(record).__name__}")
            record = {key: value for key, value in record.items() if value is not None}
            for to, was in renames:
                if was not in record:
                    found = ", ".join(map(repr, record))
                    die(f"{source}: --columns {to}={was}: no column {was!r} among {found}")
            moved = {was for _, was in renames}
            kept = {key: value for key, value in record.items() if key not in moved}
            yield source, kept | {to: record[was] for to, was in renames}
        if empty:
            die(f"{path}: no records in it")


def _json_lines(path):
    for number, line in lines(path):
        if line.strip():
            yield f"{path}:{number}", _parsed(line, f"{path}:{number}")


def _json(path):
    """A list of objects. Files with one object a line are often called .json too."""
    text = "".join(line for _, line in lines(path))
    if not text.lstrip().startswith("["):
        yield from _json_lines(path)
        return
    for i, record in enumerate(_parsed(text, path)):
        yield f"{path}[{i}]", record


def _parsed(text, source):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        die(f"{source}: not JSON ({error})")


def _csv(path):
    """The first line names the columns. A field in quotes may span several lines."""
    csv.field_size_limit(2**31 - 1)
    rows = csv.DictReader((line for _, line in lines(path)), strict=True)
    try:
        for row in rows:
            source = f"{path}:{rows.line_num}"
            if None in row or None in row.values():
                die(f"{source}: not as many cells as the {len(rows.fieldnames)} columns")
            yield source, row
    except csv.Error as error:
        die(f"{path}:{rows.line_num}: not CSV ({error})")


def _parquet(path):
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        die(f"{path}: .parquet needs pyarrow: pip install -e '.[datasets]'")
    try:
        with parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            for i, row in enumerate(rows):
                yield f"{path}[{i}]", row
    except (OSError, pyarrow.ArrowException) as error:
        die(f"{path}: {reason(error)}")


def _hub_data_set(spec):
    try:
        import datasets
    except ImportError:
        die(f"{spec}: needs the package datasets: pip install -e '.[datasets]'")
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


READERS = {
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    "hf:": _hub_data_set,
    ".jsonl": _json_lines,
}
