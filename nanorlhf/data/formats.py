"""Files that are not ours -> (source, record): JSON in other forms than a record a line, CSV,
Parquet, and data sets on the Hub. Imported only when there is such a file.

Each reader takes a path and its numbered lines, of which some make no use.
"""

import csv
import glob
import re

from nanorlhf.config import die, package, reason
from nanorlhf.data.values import DECODER, unique


def read_json(path, lines):
    """A list of objects, objects one after the other, or one that holds them all."""
    text = "".join(line for _, line in lines)
    between, values, end = re.compile(r"[\s,]*"), [], 0
    try:
        while (end := between.match(text, end).end()) < len(text):
            value, end = DECODER.raw_decode(text, end)
            values.append(value)
    except (ValueError, RecursionError) as error:
        number = 1 + text.count("\n", 0, end)
        die(f"{path}:{number}: not JSON ({error})")
    records = records_in(values[0]) if len(values) == 1 else values
    return ((f"{path}[{i}]", record) for i, record in enumerate(records))


def records_in(value):
    """The records in one JSON value: a list of them; columns, as lists or as pandas writes them; a
    list of them under a name; or else the value itself."""
    if not isinstance(value, dict):
        return value if isinstance(value, list) else [value]
    cells = list(value.values())
    if all(isinstance(c, dict) and "0" in c and c.keys() == cells[0].keys() for c in cells):
        cells = [list(c.values()) for c in cells]
    is_table = cells and all(isinstance(c, list) and len(c) == len(cells[0]) for c in cells)
    if is_table and not any(isinstance(x, dict) for c in cells for x in c):
        return [dict(zip(value, row)) for row in zip(*cells)]
    under = (value.get(key) for key in ("data", "rows", "train", "records", "examples"))
    return next((records for records in under if isinstance(records, list)), [value])


def read_csv(path, lines):
    """The first line names the columns. A field in quotes may span several lines."""
    csv.field_size_limit(2**31 - 1)
    unnumbered = [line for _, line in lines]
    separator = max(",;\t", key="".join(unnumbered[:1]).count)
    rows = csv.DictReader(unnumbered, delimiter=separator, strict=True)
    try:
        # columns without a name are nobody's: commas at the end of every line make them
        unique([(name, "...") for name in rows.fieldnames or () if name])
        for row in rows:
            if None in row or None in row.values():
                raise csv.Error(f"not as many cells as the {len(rows.fieldnames)} columns")
            yield f"{path}:{rows.line_num}", row
    except (csv.Error, ValueError) as error:
        die(f"{path}:{rows.line_num}: not CSV ({error})")


def read_parquet(path, lines):
    return load(path, "parquet", data_files=glob.escape(path), split="train", streaming=True)


def read_hub(name, lines):
    """hf:owner/name[/config][:split]"""
    path, _, split = name.removeprefix("hf:").partition(":")
    owner, repo, config = [*path.split("/", 2), "", ""][:3]
    return load(name, f"{owner}/{repo}", config or None, split=split or "train")


def load(source, path, config=None, **options):
    """Records by the package datasets."""
    datasets = package("datasets", source, "datasets")
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong is said below, once
    try:
        try:
            records = datasets.load_dataset(path, config, **options)
        except ValueError:  # no configuration of that name; HH-RLHF, for one, has folders instead
            if not config:
                raise
            records = datasets.load_dataset(path, data_dir=config, **options)
        for i, record in enumerate(records):
            yield f"{source}[{i}]", record
    except Exception as error:  # whatever the network or the file raises ends the same way
        die(f"{source}: could not be loaded ({type(error).__name__}: {reason(error)})")


READERS = {".json": read_json, ".csv": read_csv, ".parquet": read_parquet, "hf:": read_hub}
