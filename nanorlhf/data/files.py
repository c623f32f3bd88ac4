"""Files -> records, one dict each, with a source to name in messages.

Ours are .jsonl, a record a line, and .txt, both also zipped by gzip. formats.py reads the others.
"""

import ast
import gzip
import json
import re
import zlib
from contextlib import suppress
from itertools import groupby
from pathlib import Path

from nanorlhf.config import die, reason
from nanorlhf.data.values import DECODER
from nanorlhf.machine import durable

END_OF_DOCUMENT = "<|endoftext|>"  # on a line of its own in a .txt file
FOREIGN = (".json", ".csv", ".parquet", "hf:")  # what formats.py reads
# how messages stored as text begin
MESSAGES = re.compile(r"\s*\[\s*\{\s*['\"](role|from|content|value)['\"]\s*:")


def format_of(path):
    """ ".jsonl" for "a/b.JSONL.gz", "hf:" for a data set on the Hub. Under a suffix that is not
    known, what begins like records is JSON, and "" stands for plain text."""
    path = str(path)
    suffix = "hf:" if path.startswith("hf:") else Path(path.lower().removesuffix(".gz")).suffix
    suffix = {".ndjson": ".jsonl", ".tsv": ".csv"}.get(suffix, suffix)
    if suffix in FOREIGN or not Path(path).is_file():
        return suffix
    start = b""
    with suppress(OSError, EOFError, zlib.error), unzipped(path) as file:
        start = file.read(1000).removeprefix(b"\xef\xbb\xbf").lstrip()
    if suffix == ".jsonl":  # an object over several lines is no record a line
        return ".json" if re.match(rb"[\[{]\s*\n", start) else suffix
    return ".json" if re.match(rb'(\[\s*)?\{\s*"', start) else ""


def unzipped(path):
    with open(path, "rb") as file:
        is_zip = str(path).lower().endswith(".gz") or file.read(2) == b"\x1f\x8b"
    return (gzip.open if is_zip else open)(path, "rb")


def lines(path):
    """Yields (line number, line) of a text file, which may be zipped by gzip. A file that cannot be
    read exits 2."""
    try:
        with unzipped(path) as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode().removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        why = f"{error.reason} at byte {error.start} of the line"
        die(f"{path}:{number}: not UTF-8 text, but perhaps UTF-16 ({why}); save it as UTF-8")
    except (OSError, EOFError, zlib.error) as error:
        die(f"{path}: {reason(error)}")


def read_records(paths, columns=()):
    """Yields (source, record) for every record of the files, or data sets by their names
    hf:owner/name[/config][:split]. `columns` renames columns, each by "to=from". A null counts as
    an absent column."""
    renames = dict(column.partition("=")[::2] for column in columns)
    if "" in {*renames, *renames.values()} or len(renames) < len(columns):
        die(f"--columns {' '.join(columns)}: needs to=from, each once, as in prompt=my_question")
    for path in map(str, paths):
        source = None
        for source, record in reader(path)(path, lines(path)):
            if not isinstance(record, dict):
                die(f"{source}: expected an object, found {type(record).__name__}")
            record = {k: cell(source, record, k) for k in record if record[k] is not None}
            for to, was in renames.items():
                if was not in record:
                    names = ", ".join(map(repr, record))
                    die(f"{source}: --columns {to}={was}: no column {was!r} among {names}")
            kept = {key: record[key] for key in record if key not in renames.values()}
            yield source, kept | {to: record[was] for to, was in renames.items()}
        if source is None:
            die(f"{path}: no records in it: it is empty, or has blank lines or a header alone")


def reader(path):
    """The function that reads a file's records."""
    kind = format_of(path)
    if kind in FOREIGN:
        from nanorlhf.data.formats import READERS

        return READERS[kind]
    return json_lines if kind else documents


def documents(path, numbered):
    """Yields (source, {"text"}) for every document of plain text."""
    for is_end, group in groupby(numbered, lambda pair: pair[1].strip() == END_OF_DOCUMENT):
        numbers, lines = zip(*group)
        text = "".join(lines).strip("\n")
        if text.strip() and not is_end:
            yield f"{path}:{numbers[0]}", {"text": text}


def json_lines(path, numbered):
    """Yields (source, value) for every line of a .jsonl file."""
    for number, line in numbered:
        if line.strip():
            try:
                yield f"{path}:{number}", DECODER.decode(line.strip().removesuffix(","))
            except (ValueError, RecursionError) as error:
                die(f"{path}:{number}: not JSON ({error})")


def cell(source, record, key):
    """A value of a record. Messages may be stored as text, in CSV always: as JSON, or as Python
    shows them. In a judgement of ours, and in a column of texts, a text is a text, whatever it
    looks like."""
    value, is_text = record[key], key == "text" or "judgement_id" in record
    if is_text or not isinstance(value, str) or not MESSAGES.match(value):
        return value
    for parse in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return parse(value)
    die(f"{source}: {key!r} holds messages as text that is neither JSON nor Python")


def write_records(path, records):
    """Write dicts as a .jsonl file; returns its path as a string."""
    durable.write_text(path, "".join(json.dumps(record) + "\n" for record in records))
    return str(path)
