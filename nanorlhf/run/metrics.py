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
            header, *lines = list(csv.reader(file)) or [[]]
        if lines and len(lines[-1]) < len(header):
            lines.pop()
        cells = [zip(header, line, strict=True) for line in lines]
        rows = [{name: cell for name, cell in row if cell} for row in cells]
        for number in (x for row in rows for x in row.values()):
            float(number)  # raises where it is none
        return header, [row for row in rows if float(int(row["step"])) < end]
    except (OSError, ValueError, KeyError, OverflowError, csv.Error) as error:
        die(f"{path}: no metrics of a stage that has run ({reason(error)}); mend or move it")
