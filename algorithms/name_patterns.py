"""Regular expressions over the names of parameters: what somebody means who writes one, and selectors instead."""

from __future__ import annotations

import re
from collections.abc import Sequence


def precise(pattern: str) -> str:
    r"""Return a regular expression for the names that somebody means who reads ``.`` as a dot.

    Example:
        >>> precise("layer.1"), precise("layer.1.*"), precise(r"layer\.1\..*")
        ('layer\\.1\\.', 'layer\\.1\\..*', 'layer\\.1\\..*')
        >>> precise("layer.weight"), precise("layer.*"), precise("[ab].w")
        ('layer\\.weight', 'layer.*', '[ab]\\.w')
    """
    # Letters stand on both sides of a plain dot, or the end; a dot with a quantifier is meant as one.
    dotted = re.sub(r"(?<=[\w\])}*])(?<!\\)\.(?![*+?{])", r"\\.", pattern)
    dotted = re.sub(r"(?<=\d)\.(?=[*+])", r"\\..", dotted)
    return dotted + r"\." if re.search(r"\d$", dotted) else dotted


def cuts_number(pattern: str, name: str) -> bool:
    r"""Return whether a regular expression takes a number in a name for its first digits.

    Example:
        >>> cuts_number("layer.(1|2).*", "layer.10.w"), cuts_number(r"layer\.(1|10)\.", "layer.10.w")
        (True, False)
        >>> cuts_number("layer.1", "layer.1.w"), cuts_number("layer.1", "layer.12"), cuts_number("layer.*", "layer.12")
        (False, True, False)
    """
    expression = re.compile(pattern)
    for number in re.finditer(r"\d{2,}", name):
        before, digits, after = name[: number.start()], number[0], name[number.end() :]
        forms = [digits[:count] + "x" * (len(digits) - count) for count in range(len(digits))]
        without, *cut = (bool(expression.match(before + form + after)) for form in forms)
        if any(cut) and not without:
            return True
    return False


def guarded(pattern: str) -> str:
    r"""Return a regular expression in which no digit follows where a number may end.

    Example:
        >>> print(guarded(r"layer\.1"), guarded("layer.(1|2)"), guarded("[0-9]"), guarded(r"1+\d"))
        layer\.1(?!\d) layer.(1(?!\d)|2(?!\d))(?!\d) [0-9](?!\d) 1+\d(?!\d)
    """
    return re.sub(r"(\[[^\]]*\]|\\d|(?<!\\)\d+|\))(?![*+?{\d]|\\d)", r"\1(?!\\d)", pattern)


def compact(names: Sequence[str], everything: Sequence[str]) -> tuple[str, ...]:
    """Return selectors for exactly these parameters: modules where all of a module's are among them, names elsewhere.

    Example:
        >>> compact(["a.0.w", "a.0.b", "a.1.w"], ["a.0.w", "a.0.b", "a.1.w", "a.1.b"])
        ('a.0', 'a.1.w')
        >>> compact(["a.0.w", "a.1.w"], ["a.0.w", "a.1.w", "b.w"]), compact(["head.w"], ["head.w", "b.w"])
        (('a',), ('head.w',))
    """
    chosen = set(names)
    # Not by these names: as selectors they are layers.
    mixed = {"stem", "blocks", "head"}
    for name in everything:
        if name not in chosen:
            mixed.update(_modules(name))
    return tuple(dict.fromkeys(next((each for each in _modules(name) if each not in mixed), name) for name in names))


def _modules(name: str) -> list[str]:
    """Return the modules around a parameter, the outermost first.

    Example:
        >>> _modules("a.b.weight"), _modules("weight")
        (['a', 'a.b'], [])
    """
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]
