"""Learning rates and group options: what an owner sets or scales for parameters, whether they train or not."""

from __future__ import annotations

import sys

from .books import Books
from .clock import Time
from .errors import ArgumentError, LedgerClosedError
from .events import Event
from .groups import Course
from .homes import MANAGED
from .schedules import Schedule, as_schedule, schedule_from_description
from .selectors import Selector


class Rates(Books):
    """The calls of :class:`~thawline.engine.ParameterLedger` that set rates and options; it adds what trains."""

    def scale(self, select: Selector, factor: float, *, owner: str) -> None:
        """Set ``owner``'s factor on the learning rate; factors of several owners multiply.

        Args:
            select: What to scale.
            factor: Relative to the home rate; setting it again replaces it.
            owner: Whose factor it is.

        Raises:
            ArgumentError: The factor is negative or no finite number.
            SelectorError: ``select`` matches nothing.
        """
        self._check_open("scale", owner)
        value = _number("scale(factor=)", factor, "factor=0.5")
        self._replace(self._holds.scale(self._resolve(select), owner, value))

    def set_lr(self, select: Selector, lr: float | None, *, owner: str) -> None:
        """Set an absolute base learning rate, which factors and schedule still multiply.

        Args:
            select: Whose rate it is.
            lr: The rate; None takes back what ``owner`` has set.
            owner: Who sets it.

        Raises:
            LedgerError: Another owner has set one; the message names both.
            ArgumentError: The rate is negative or no finite number.
            SelectorError: ``select`` matches nothing.
        """
        self._check_open("set_lr", owner)
        value = None if lr is None else _number("set_lr(lr=)", lr, "lr=1e-3")
        self._replace(self._holds.put("lr", self._resolve(select), owner, value))

    def set_options(self, select: Selector, *, owner: str, **options: float | None) -> None:
        """Set options of the optimizer's groups for some parameters, such as ``weight_decay=0.1``.

        Args:
            select: Whose options they are.
            owner: Who sets them.
            **options: Numbers that the optimizer keeps in its groups, 0 or above; None takes back what ``owner`` has set.

        Raises:
            LedgerError: Another owner has set one; the message names both. Nothing was set.
            ArgumentError: The optimizer has no such option, or it is negative or no finite number.
            SelectorError: ``select`` matches nothing.

        Example:
            >>> import torch
            >>> from thawline.engine import ParameterLedger
            >>> model = torch.nn.Linear(2, 1)
            >>> ledger = ParameterLedger(model, torch.optim.AdamW(model.parameters(), weight_decay=0.1))
            >>> ledger.set_options("bias", owner="me", weight_decay=0.0)
            >>> [group.options["weight_decay"] for group in ledger.groups]
            [0.1, 0.0]
        """
        self._check_open("set_options", owner)
        selection = self._resolve(select)
        homes = {home.index: home for name in selection.names if (home := self._homes.get(name)) is not None}
        values: dict[str, float | None] = {}
        for option, value in options.items():
            values[option] = None if value is None else _number(f"set_options({option}=)", value, f"{option}=0.1")
            for home in homes.values():
                had = home.options.get(option)
                if option in MANAGED | {"lr"} or isinstance(had, bool) or not isinstance(had, (int, float)):
                    kind = type(self.optimizers[home.optimizer]).__name__
                    numbers = [key for key, each in home.options.items() if type(each) in (int, float) and key != "lr"]
                    takes = f"numbers that {kind} keeps in its groups: {', '.join(numbers) or 'it has none'}"
                    raise ArgumentError(
                        f"ledger.set_options({option}=)", got=value, takes=takes,
                        example="ledger.set_options('head', weight_decay=0.1, owner=self.owner)",
                    )  # fmt: skip
        for option, number in values.items():
            if number is not None:
                self._holds.check_undisputed(option, selection, owner, number)
        changed: list[str] = []
        for option, number in values.items():
            changed += self._holds.put(option, selection, owner, number)
        self._replace(changed)

    def set_schedule(
        self, select: Selector, schedule: Schedule | None, *, owner: str, span: Time | str | int | None = None
    ) -> None:
        """Give parameters a schedule of their own, from now on and over ``span``, in place of the fit's.

        Args:
            select: Whose rates follow it.
            schedule: One of the engine's, without times of its own; None takes back what ``owner`` has set.
            owner: Who sets it.
            span: How long it is; after that its last factor stays.

        Raises:
            LedgerError: Another owner has set one; the message names both.
            ArgumentError: A function of one's own, which a checkpoint cannot hold; times inside; no span.
            SelectorError: ``select`` matches nothing.

        Example:
            >>> import torch
            >>> from thawline.engine import Clock, ParameterLedger, linear
            >>> model = torch.nn.Linear(2, 1)
            >>> ledger = ParameterLedger(model, torch.optim.SGD(model.parameters(), lr=1.0))
            >>> ledger.set_schedule("*", linear(), owner="me", span="4ba")
            >>> ledger.apply_lr(Clock(batch=3))
            >>> ledger.groups[0].lr
            0.25
        """
        self._check_open("set_schedule", owner)
        selection = self._resolve(select)
        course = None
        if schedule is not None:
            example = "ledger.set_schedule('head', cosine(), span='2ep', owner=self.owner)"
            try:
                built = schedule_from_description(as_schedule(schedule).describe())
            except ArgumentError:  # a function of one's own, which a checkpoint could not hold
                built = None
            if built is None or not built.bound:
                takes = "a schedule of thawline.engine whose times are shares, such as warmup(0.1)"
                raise ArgumentError("ledger.set_schedule(schedule=)", got=schedule, takes=takes, example=example)
            time = None if span is None else Time(span)
            if time is None or not time.value:
                raise ArgumentError("ledger.set_schedule(span=)", got=span, takes="a time above zero", example=example)
            course = Course(built, time, time.elapsed(self.clock))
        self._replace(self._holds.put("schedule", selection, owner, course))

    # -- inside ------------------------------------------------------------------------------------------------

    def _check_open(self, call: str, owner: object) -> None:
        if self.phase is not None and not self.phase.opens_ledger:
            later = Event.BATCH_START if self.phase.name.startswith("EVAL") else Event.BATCH_END
            raise LedgerClosedError(
                f"ledger.{call} was called at {self.phase.name}, where the ledger is closed: a change there would tear the "
                f"step. Keep the decision in the algorithm's state and call it at Event.{later.name}."
            )
        if not isinstance(owner, str) or not owner:
            takes = "a name: self.owner in an algorithm's methods, the second parameter in a function of @on"
            raise ArgumentError(f"ledger.{call}(owner=)", got=owner, takes=takes, example="owner=self.owner")
        self._acting = owner


def _number(argument: str, value: object, example: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= sys.float_info.max:
        raise ArgumentError(f"ledger.{argument}", got=value, takes="a finite number, 0 or above", example=example)
    return float(value)
