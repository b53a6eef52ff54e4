"""The check of the conformance kit that runs the examples of an algorithm's documentation."""

from __future__ import annotations

import doctest
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir
from typing import Any

from .functions import FunctionAlgorithm
from .promises import check, fail
from .randomness import Randomness
from .rehearsal import Rehearsal
from .specimens import Specimen


@check
def does_as_its_examples_say(rehearsal: Rehearsal) -> None:
    """The examples in its docstring, and in those of its methods, give what they show."""
    for documented in _documented(rehearsal):
        module = sys.modules[documented.__module__]
        for examples in doctest.DocTestFinder().find(documented, documented.__name__, module=module):
            printed: list[str] = []
            runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
            with tempfile.TemporaryDirectory() as folder, chdir(folder), Randomness().kept():
                failed, _ = runner.run(examples, out=printed.append)
            if failed:
                fail(f"{examples.name}: an example of its docstring does not give what it shows.\n{''.join(printed)}")


def _documented(rehearsal: Rehearsal) -> Iterator[Any]:
    """Yield what builds the algorithms, and their classes or functions, each once."""
    made = [each.function if isinstance(each, FunctionAlgorithm) else type(each) for each in rehearsal.make()]
    build = rehearsal.factory.build if isinstance(rehearsal.factory, Specimen) else rehearsal.factory
    yield from dict.fromkeys([build, *made] if hasattr(build, "__name__") else made)
