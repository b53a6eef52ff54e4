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

from .algorithm import Algorithm
from .checkpoint import seed_everything
from .promises import check, fail
from .randomness import Randomness
from .rehearsal import Rehearsal, quiet
from .specimens import Specimen


@check
def does_as_its_examples_say(rehearsal: Rehearsal) -> None:
    """The examples in docstrings give what they show: in its module, what that imports from its package, and what builds on it.

    What builds on it is each module beside it, imported already, that imports it, or what of the package no other algorithm
    imports, and imports no other algorithm: functions that save and load what it attaches, but not the presets. A list
    of several algorithms leaves these to the checks of each.
    """
    for documented in _documented(rehearsal):
        for examples in _examples(documented):
            printed: list[str] = []
            runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
            with (
                tempfile.TemporaryDirectory() as folder,
                chdir(folder),
                Randomness().kept(),
                quiet(),
                redirect_stderr(io.StringIO()),
            ):
                seed_everything(rehearsal.seed)
                failed, _ = runner.run(examples, out=printed.append)
            if failed:
                fail(
                    f"{rehearsal.name}: an example in the docstring of {examples.name} does not give what it shows. Correct one of "
                    "the two; each docstring begins anew, in an empty folder. One that needs what is not there, a file or a network, "
                    f"ends in: # doctest: +SKIP\n{''.join(printed)}"
                )


def _documented(rehearsal: Rehearsal) -> list[Any]:
    """Return the modules of what builds the algorithms and of their classes; of what stands in no module's names, only these."""
    build = rehearsal.factory.build if isinstance(rehearsal.factory, Specimen) else rehearsal.factory
    made: list[Any] = [type(each) for each in rehearsal.make()]
    found: dict[Any, None] = {}
    for each in [build, *made] if inspect.isroutine(build) and build.__name__ != "<lambda>" else made:
        if each.__module__ not in sys.modules:
            continue
        if each.__module__ == "__main__" or "<locals>" in each.__qualname__:
            found[each] = None
        else:
            _follow(sys.modules[each.__module__], found)
    module = sys.modules.get(made[0].__module__)
    if len(made) == 1 and module is not None and module in found:
        for each in _built_upon(module):
            _follow(each, found)
    return list(found)


def _examples(documented: Any) -> list[doctest.DocTest]:
    """Return the examples of a module, or of a class or function whose source may be nowhere, as where a notebook defines it."""
    if isinstance(documented, ModuleType):
        return doctest.DocTestFinder().find(documented, documented.__name__, module=documented)
    names = vars(sys.modules[documented.__module__]) | {documented.__name__: documented}
    inside = [each for each in vars(documented).values() if inspect.isroutine(each) or isinstance(each, property)]
    texts = [text for each in (documented, *inside) if isinstance(text := each.__doc__, str)]
    parser = doctest.DocTestParser()
    return [parser.get_doctest(text, names.copy(), documented.__name__, None, None) for text in texts]


def _follow(module: ModuleType, found: dict[Any, None]) -> None:
    """Add a module, and those of its package which it imports, or whose classes and functions it has."""
    found[module] = None
    for each in list(vars(module).values()):
        name = each.__name__ if isinstance(each, ModuleType) else str(getattr(each, "__module__", ""))
        other = sys.modules.get(name)
        if (
            module.__package__
            and name.startswith(f"{module.__package__}.")
            and other is not None
            and other not in found
        ):
            _follow(other, found)


def _built_upon(module: ModuleType) -> list[ModuleType]:
    """Return the modules beside an algorithm's that import it, or what it alone imports, and no other algorithm."""
    beside = [
        each
        for name, each in list(sys.modules.items())
        if isinstance(each, ModuleType) and name.rpartition(".")[0] == module.__package__ != ""
    ]
    imported: dict[ModuleType, dict[Any, None]] = {each: {} for each in [module, *beside]}
    for each, found in imported.items():
        _follow(each, found)
    own = set(imported[module])
    for each in filter(_has_algorithm, beside):
        if module not in imported[each]:
            own.difference_update(imported[each])
    return [
        each
        for each in beside
        if not own.isdisjoint(imported[each])
        and not any(map(_has_algorithm, imported[each].keys() - imported[module].keys()))
    ]


def _has_algorithm(module: ModuleType) -> bool:
    return any(
        isinstance(each, type) and issubclass(each, Algorithm) and each.__module__ == module.__name__
        for each in vars(module).values()
    )
