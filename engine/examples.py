"""The check of the conformance kit that runs the examples of an algorithm's documentation."""

from __future__ import annotations

import doctest
import inspect
import io
import sys
import tempfile
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
    """The examples in the docstrings of its module, and of what that imports from its package, give what they show."""
    for documented in _documented(rehearsal):
        module = documented if isinstance(documented, ModuleType) else sys.modules[documented.__module__]
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


def _documented(rehearsal: Rehearsal) -> list[Any]:
    """Return the modules of what builds the algorithms and of their classes; of a script or notebook only these."""
    build = rehearsal.factory.build if isinstance(rehearsal.factory, Specimen) else rehearsal.factory
    made = [each.function if isinstance(each, FunctionAlgorithm) else type(each) for each in rehearsal.make()]
    found: dict[Any, None] = {}
    for each in [build, *made] if inspect.isroutine(build) else made:
        if each.__module__ == "__main__":
            found[each] = None
        else:
            _follow(sys.modules[each.__module__], found)
    return list(found)


def _follow(module: ModuleType, found: dict[Any, None]) -> None:
    """Add a module, and those of its package whose classes and functions it has."""
    found[module] = None
    for each in list(vars(module).values()):
        name = str(getattr(each, "__module__", ""))
        if module.__package__ and name.startswith(f"{module.__package__}.") and sys.modules[name] not in found:
            _follow(sys.modules[name], found)
