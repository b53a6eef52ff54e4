"""A line that YAML reads otherwise than it was meant, as it was meant."""

from __future__ import annotations

import re

_QUOTED = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^']|'')*'")
LONGEST_LINE = 300
"""Longer lines stay as they are."""
# A glob that begins with a star is an alias, and a bracket inside a flow list ends it.
_GLOB = re.compile(r"(?<![^\s,\[:])\*[^\s,\]]*(?:\[[^\]\s]*\][^\s,\]]*)*")
_LAYER = re.compile(r"[\w.*]*\w\[-?\d*(?::-?\d*)?\][\w.*]*")
_NO_SPACE = re.compile(r"^(\s*(?:- )?[a-z_]+):(?=[^\s/])")
_PERCENT = re.compile(r"(?<![^\s,\[])[%@`][^\s,\]]*")


def quote(line: str) -> str:
    r"""Return the line with the usual slips corrected: quotes around globs and layers, spaces for tabs, a space after a colon.

    Example:
        >>> quote("  thaw: [*.bias, blocks[-1]]")
        'thaw: ["*.bias", "blocks[-1]"]'
        >>> quote("until:\t2ep"), quote("lr:1.0e-3")
        ('until:  2ep', 'lr: 1.0e-3')
        >>> quote("lr: 5%"), quote("a: %b"), quote("freeze: blocks[:2].*.weight")
        ('lr: 5%', 'a: "%b"', 'freeze: "blocks[:2].*.weight"')
        >>> quote(" x:y" + "z" * 296) == "x: y" + "z" * 296, quote("x:y" + "z" * 298)[:4]  # longer lines stay as they are
        (True, 'x:yz')
    """
    line = line.strip()
    if len(line) > LONGEST_LINE:
        return line
    line = line.replace("\t", "  ")
    line = _NO_SPACE.sub(r"\1: ", line)
    for pattern in (_GLOB, _LAYER, _PERCENT):
        line = _outside_quotes(pattern, line)
    return line


def _outside_quotes(pattern: re.Pattern[str], line: str) -> str:
    r"""Put quotes around what the pattern finds, where none are.

    Example:
        >>> _outside_quotes(_GLOB, "[*.a, '*.b', *.c, \"*.d\", *.e]")
        '["*.a", \'*.b\', "*.c", "*.d", "*.e"]'
    """
    pieces: list[str] = []
    end = 0
    for found in _QUOTED.finditer(line):
        pieces += [pattern.sub(r'"\g<0>"', line[end : found.start()]), found[0]]
        end = found.end()
    return "".join([*pieces, pattern.sub(r'"\g<0>"', line[end:])])
