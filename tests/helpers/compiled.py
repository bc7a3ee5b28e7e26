"""Readers of compiled modules."""

import re

import numpy as np


def copies(text: str, least: int) -> list[str]:
    """Copies and transposes of at least so many elements in a compiled module; those onto themselves excepted."""
    in_place = set(re.findall(r"output_to_operand_aliasing=\{\{\}: \(0, \{\}\)\}, calls=(%\S+)", text))
    found, computation = [], ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            computation = line.split()[0]
        copy = re.search(r"= (\w+\[([\d,]+)\]\S*) (?:copy|transpose|copy-start)\((.*)", line)
        if copy and np.prod([int(n) for n in copy[2].split(",")]) >= least and computation not in in_place:
            found.append(f"{copy[1]} {copy[3]}")
    return found
