"""What the ledger must say, as plain dicts, and selectors to ask it with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from .ledger import ParameterLedger

OWNERS = ("a", "b", "c")


class LedgerOracle:
    """What the ledger must say, as plain dicts: no groups, no optimizer, no interning.

    Args:
        ledger: As it was made; only its names and base rates are read.
        owners: Who will call it.

    Example:
        >>> import torch
        >>> from thawline.engine.doubles import mlp
        >>> ledger = ParameterLedger(mlp(), lambda each: torch.optim.SGD(each, lr=0.1))
        >>> oracle = LedgerOracle(ledger)
        >>> oracle.freeze("head", ledger.select("head"), "a")
        >>> sorted(oracle.trainable())
        ['0.bias', '0.weight', '2.bias', '2.weight']
    """

    def __init__(self, ledger: ParameterLedger, owners: Sequence[str] = OWNERS) -> None:
        self.names = list(ledger.parameters)
        self.base = {name: group.base_lr for group in ledger.groups for name in group.parameters}
        self.holds: dict[str, set[str]] = {owner: set() for owner in owners}
        self.rules: dict[str, list[tuple[Any, bool]]] = {owner: [] for owner in owners}
        self.scales: dict[str, dict[str, float]] = {owner: {} for owner in owners}
        self.rates: dict[str, float] = {}
        self.given = {name: dict(group.options) for group in ledger.groups for name in group.parameters}
        self.options: dict[str, dict[str, Any]] = {}
        self.courses: dict[str, Callable[[int], float]] = {}
        self.attached: dict[str, str] = {}

    def freeze(self, selector: Any, names: Sequence[str], owner: str) -> None:
        """Add a hold."""
        self.holds[owner] |= set(names)
        self.rules[owner].append((selector, True))

    def thaw(self, selector: Any, names: Sequence[str], owner: str) -> None:
        """Release a hold."""
        self.holds[owner] -= set(names)
        self.rules[owner].append((selector, False))

    def scale(self, names: Sequence[str], factor: float, owner: str) -> None:
        """Set a factor."""
        self.scales[owner].update(dict.fromkeys(names, factor))

    def set_lr(self, names: Sequence[str], lr: float | None) -> None:
        """Set an absolute base rate, or with None take it back."""
        _put(self.rates, names, lr)

    def set_options(self, names: Sequence[str], **options: Any) -> None:
        """Set options of the optimizer, or with None take them back."""
        for option, value in options.items():
            _put(self.options.setdefault(option, {}), names, value)

    def set_schedule(self, names: Sequence[str], course: Callable[[int], float] | None) -> None:
        """Set a schedule of their own, the factor at each batch, or with None take it back."""
        _put(self.courses, names, course)

    def attach(
        self,
        ledger: ParameterLedger,
        module: str,
        name: str,
        owner: str,
        *,
        base_lr: float | None = None,
        like: str | None = None,
    ) -> None:
        """Take in a parameter beside the module's weight: rates of its neighbor, holds by others' patterns.

        Args:
            ledger: To which it was attached.
            module: The module's name.
            name: The new parameter's name in the module.
            owner: Who attached it.
            base_lr: Its base rate, where that is not its neighbor's.
            like: A parameter that has its options, where that is not its neighbor.
        """
        (name,), (beside,) = ledger.select(f"{module}.{name}"), ledger.select(f"{module}.weight")
        self.attached[module] = owner
        self.names = list(ledger.parameters)
        self.base[name] = self.base[beside] if base_lr is None else base_lr
        self.given[name] = self.given[beside if like is None else like]
        for table in self._tables():
            if beside in table:
                table[name] = table[beside]
        for other, rules in self.rules.items():
            wishes = [held for selector, held in rules if covered(selector, name, ledger)]
            if other != owner and wishes and wishes[-1]:
                self.holds[other].add(name)

    def detach(self, ledger: ParameterLedger, name: str) -> None:
        """Forget a parameter that is gone."""
        self.names = list(ledger.parameters)
        for held in self.holds.values():
            held.discard(name)
        for table in self._tables():
            table.pop(name, None)

    def trainable(self) -> set[str]:
        """Return what nobody holds."""
        return {name for name in self.names if not any(name in mine for mine in self.holds.values())}

    def lr(self, name: str, factor: float, batch: int = 0) -> float:
        """Return a rate at a batch, under the fit's factor there or that of a schedule of its own."""
        value = self.rates.get(name, self.base[name])
        assert value is not None, "the optimizers here have rates"
        for mine in self.scales.values():
            value *= mine.get(name, 1.0)
        return value * (self.courses[name](batch) if name in self.courses else factor)

    def option(self, name: str, option: str) -> Any:
        """Return an option of the optimizer."""
        return self.options.get(option, {}).get(name, self.given[name][option])

    def _tables(self) -> list[dict[str, Any]]:
        """Return what is set by name and taken over from a neighbor."""
        return [*self.scales.values(), self.rates, *self.options.values(), self.courses]


def _put(table: dict[str, Any], names: Sequence[str], value: Any) -> None:
    for name in names:
        table[name] = value
        if value is None:
            del table[name]


def selectors_of(ledger: ParameterLedger) -> list[Any]:
    """Return selectors of every form that match something in this model, the plainest first.

    Example:
        >>> import torch
        >>> from thawline.engine.doubles import mlp
        >>> selectors_of(ParameterLedger(mlp(), lambda each: torch.optim.SGD(each, lr=0.1)))[:4]
        ['blocks[0]', 'blocks[1]', 'head', '0.weight']
    """
    names = list(ledger.parameters)
    modules = sorted({name.rpartition(".")[0] for name in names if "." in name})
    biases = ["*.bias"] if any(name.endswith(".bias") for name in names) else []
    return [*(layer.name for layer in ledger.layers), *names[:6], *modules, "*", *biases, names[::2]]


def covered(selector: Any, name: str, ledger: ParameterLedger) -> bool:
    """Return whether a pattern, written down long ago, covers a parameter that was attached since.

    Example:
        >>> import torch
        >>> from thawline.engine.doubles import mlp
        >>> covered("head", "4.weight", ParameterLedger(mlp(), lambda each: torch.optim.SGD(each, lr=0.1)))
        True
    """
    if not isinstance(selector, str):
        return False
    if selector in {layer.name for layer in ledger.layers}:
        return ledger.layers.of(name).name == selector
    return name.startswith(f"{selector}.") or ("*" in selector and fnmatchcase(name, selector))
