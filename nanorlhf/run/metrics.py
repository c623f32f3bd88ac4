"""Reading metrics.csv back: for a run that resumes, the doctor, a picture, a model card."""

import csv
import math

from nanorlhf.config import die, reason


def read_rows(path, end=math.inf):
    """(header, rows) of a metrics.csv or timing.csv, up to step `end` and without it. A row is a
    dict from column to cell, the text of a number; blank cells are left out. So is a last row with
    too few cells: it is being written, or a kill cut it short. Exits 2 at any other damage."""
    try:
        with open(path) as file:
            header, *table = list(csv.reader(file)) or [[]]
    except (OSError, ValueError, csv.Error) as error:
        die(f"{path}: {reason(error)}; the metrics of a stage that has run are read there")
    if header and header[0] != "step":
        die(f"{path}: its first column is not 'step'; mend it or move it away")
    if table and len(table[-1]) < len(header):
        table.pop()
    rows = []
    for number, cells in enumerate(table, 2):
        try:
            if float(int(cells[0])) < end:  # a damaged number may be too large for a float
                row = {name: cell for name, cell in zip(header, cells, strict=True) if cell}
                list(map(float, row.values()))  # raises where one is no number
                rows.append(row)
        except (ValueError, IndexError, OverflowError):
            shown = repr(",".join(cells)[:60])
            die(f"{path}, line {number}: not a row of metrics: {shown}; mend it or move it away")
    return header, rows
