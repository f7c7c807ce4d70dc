"""What a terminal shows in the end: the few control sequences of a display in progress."""

import re

SEQUENCE = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])|\r|\n|[^\x1b\r\n]+")


def screen(text: str) -> list[str]:
    """The lines of a terminal without limits that has received a text."""
    lines, row, column = [""], 0, 0
    for found in SEQUENCE.finditer(text):
        part, number, code = found[0], found[1], found[2]
        if part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
        elif code == "A":
            row -= int(number or 1)
        elif code == "K":
            lines[row] = ""
        elif code is None:
            line = lines[row].ljust(column)
            lines[row] = line[:column] + part + line[column + len(part) :]
            column += len(part)
        lines += [""] * (row + 1 - len(lines))
    return [line.rstrip() for line in lines]
