"""metrics.csv, read back: by a run that goes on, by the doctor, for a picture and a model card."""

import csv
import math

from nanorlhf.config import die, reason


def read_rows(path, end=math.inf):
    """(header, rows) of a metrics.csv or timing.csv. A row is a dict from column to cell, which is
    the text of a number; blank cells are left out, and so are rows from step `end` on. A last row
    with too few cells is left out as well: it is being written, or a kill cut it short."""
    try:
        with open(path) as file:
            header, *lines = list(csv.reader(file)) or [[]]
    except (OSError, ValueError, csv.Error) as error:
        die(f"{path}: {reason(error)}; the metrics of a stage that has run are read there")
    if header and header[0] != "step":
        die(f"{path}: its first column is not 'step'; mend it or move it away")
    if lines and len(lines[-1]) < len(header):
        lines.pop()
    rows = []
    for number, cells in enumerate(lines, 2):
        try:
            if float(int(cells[0])) < end:  # a damaged number may be too large for a float
                rows.append({k: x for k, x in zip(header, cells, strict=True) if x})
                [float(x) for x in rows[-1].values()]
        except (ValueError, IndexError, OverflowError):
            shown = repr(",".join(cells)[:60])
            die(f"{path}, line {number}: not a row of metrics: {shown}; mend it or move it away")
    return header, rows
