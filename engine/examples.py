"""The check of the conformance kit that runs the examples of an algorithm's documentation."""

from __future__ import annotations

import doctest
import inspect
import io
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir, redirect_stderr
from types import ModuleType
from typing import Any

from .functions import FunctionAlgorithm
from .promises import check, fail
from .randomness import Randomness
from .rehearsal import Rehearsal, quiet
from .specimens import Specimen


@check
def does_as_its_examples_say(rehearsal: Rehearsal) -> None:
    """The examples in its docstring, in those of its methods and of what else its module offers, give what they show."""
    for module, documented in _documented(rehearsal):
        for examples in doctest.DocTestFinder().find(documented, documented.__name__, module=module):
            printed: list[str] = []
            runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
            with (
                tempfile.TemporaryDirectory() as folder,
                chdir(folder),
                Randomness().kept(),
                quiet(),
                redirect_stderr(io.StringIO()),
            ):
                failed, _ = runner.run(examples, out=printed.append)
            if failed:
                fail(f"{examples.name}: an example of its docstring does not give what it shows.\n{''.join(printed)}")


def _documented(rehearsal: Rehearsal) -> Iterator[tuple[ModuleType, Any]]:
    """Yield the modules of what builds the algorithms and of their classes, each once; of a script or notebook only these."""
    build = rehearsal.factory.build if isinstance(rehearsal.factory, Specimen) else rehearsal.factory
    made = [each.function if isinstance(each, FunctionAlgorithm) else type(each) for each in rehearsal.make()]
    for each in dict.fromkeys([build, *made] if inspect.isroutine(build) else made):
        module = sys.modules[each.__module__]
        yield module, each if module.__name__ == "__main__" else module
