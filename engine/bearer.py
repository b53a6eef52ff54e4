"""A neighbor for the conformance kit's fits that bears state of every type that a checkpoint takes."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from .algorithm import Algorithm, Stage
from .events import Event
from .promises import fail
from .state import State


class Bearer(Algorithm):
    """Bears state of every type, which follows from the batch, and looks whether it came back as it was.

    Args:
        opened: Where it notes that it was attached, until it is closed.

    Example:
        >>> bearer = Bearer(opened=[0])
        >>> bearer.load_state_dict(bearer.state_dict())
        >>> bearer.batch
        0
    """

    events = frozenset({Event.BATCH_START, Event.BATCH_END, Event.FIT_END})
    stage: ClassVar[Stage] = Stage.SURGERY

    def __init__(self, opened: list[int]) -> None:
        self.opened = opened
        self.batch = self.acted = 0
        self.borne = of_every_type(0)

    @override
    def attach(self, state: State) -> None:
        """Note it."""
        self.opened.append(self.acted)

    @override
    def close(self) -> None:
        """Note it."""
        self.opened.clear()

    @override
    def apply(self, event: Event, state: State) -> None:
        """Count, and change a tensor in place."""
        self.acted += 1
        if event is Event.BATCH_START and self.batch != state.clock.batch:
            fail(f"at batch {state.clock.batch} an algorithm beside has the state of batch {self.batch}.")
        elif event is Event.BATCH_END:
            self.batch = state.clock.batch
            live, self.borne = self.borne, of_every_type(self.batch)
            live["live"].add_(1)
            self.borne["live"] = live["live"]
        elif event is Event.FIT_END:
            self.borne = {}

    @override
    def describe(self) -> dict[str, Any]:
        """Say only that it is one."""
        return {"name": "Bearer", "arguments": {}}

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return all of it."""
        return {"batch": self.batch, "borne": self.borne}

    @override
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take it, and look."""
        if self.opened != [0] or self.acted:
            fail(
                "an algorithm beside was given the state of a checkpoint before it was closed, constructed and attached again."
            )
        self.batch, self.borne = saved["batch"], dict(saved["borne"])
        if place := first_unlike(self.borne, of_every_type(self.batch), "state"):
            fail(f"an algorithm beside was given another {place} by its checkpoint of batch {self.batch} than it had.")
        first, second = self.borne["twice"]
        if first is not second:
            fail("what was one tensor in two places of a state came back from a checkpoint as two.")


def of_every_type(batch: int) -> dict[str, Any]:
    """Return every type that a checkpoint takes, with values that follow from a number."""
    numbers = torch.arange(6.0).reshape(2, 3) + batch
    several = [
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int8,
        torch.uint16,
        torch.complex64,
        torch.complex128,
    ]
    narrow = [torch.float8_e4m3fn, torch.float8_e5m2]
    weightless = [getattr(torch, name) for name in ("float8_e8m0fnu", "float4_e2m1fn_x2") if hasattr(torch, name)]
    waves = torch.tensor([1 + 2j, batch + 1j])
    raw = torch.tensor([1, 2, 3, 120 + batch], dtype=torch.uint8)
    return {
        "live": numbers.clone(),
        "twice": [numbers, numbers],
        "views": (numbers.T, numbers[:, ::2], numbers[0].expand(2, 3), numbers[:0], numbers[1, 2]),
        "conjugate": [waves, waves.conj(), waves.imag, waves.conj().imag],
        "dtypes": [numbers.to(each) for each in several],
        "bits": [raw.view(each) for each in (*narrow, *weightless)],
        "truth": numbers > 3,
        "strange": torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-45]),
        "array": [
            np.arange(batch, batch + 4, dtype=">i2"),
            np.asfortranarray(numbers.numpy()),
            np.zeros((0, 2), "<f4"),
        ],
        "number": (np.float32(0.1), np.int64(batch), np.bool_(True), np.complex64(1j)),
        "int": [(1 << 63) - 1, 1 << 63, -(1 << 63), -(1 << 63) - 1, (1 << 200) + batch, True, None],
        "float": [0.1, -0.0, float("nan"), float("inf"), float("-inf"), 5e-324],
        "text": ["", "é", "\ud800", "\ud83d\ude00", "\U0001f600", f"$tensor{batch}"],
        "bytes": [b"", b"\x00\xff", bytes([batch % 256])],
        "kinds": [torch.bfloat16, torch.device("cpu"), torch.device("cuda", 3), torch.Size([2])[0]],
        "keys": {None: 1, True: 2, 2: 3, 0.5: 4, ("a", (1 << 70)): 5, "$tensor": 6, "$": numbers, "": [], "\udfff": ()},
        "pairs": {"\ud83d\ude00": 1, "\U0001f600": 2},
        "a": {"b": numbers + 1, "$dict": {"$float": 1.0}},
        "a/b": numbers + 2,
        "nested": [[[(), {}, [batch, (batch, [numbers + 3])]]]],
    }


def first_unlike(first: Any, second: Any, place: str) -> str | None:
    """Return where two trees first differ in type, order or bits; None where they do not.

    Example:
        >>> first_unlike({"a": (1, 2.0)}, {"a": (1, 2)}, "state")
        "state['a'][1]"
    """
    if type(first) is not type(second):
        return place
    if isinstance(first, dict):
        if found := first_unlike(list(first), list(second), f"{place}, in its keys"):
            return found
        pairs = [(f"{place}[{key!r}]", each, second[key]) for key, each in first.items()]
    elif isinstance(first, (list, tuple)):
        if len(first) != len(second):
            return place
        pairs = [(f"{place}[{index}]", *both) for index, both in enumerate(zip(first, second, strict=True))]
    else:
        return None if _bits(first) == _bits(second) else place
    return next((found for where, one, other in pairs if (found := first_unlike(one, other, where))), None)


def _bits(value: Any) -> object:
    """Return what a leaf is to the bit."""
    if isinstance(value, Tensor):
        flat = value.resolve_conj().reshape(-1)
        return str(value.dtype), value.shape, str(value.device), bytes(flat.contiguous().view(torch.uint8).tolist())
    if isinstance(value, (np.ndarray, np.generic)):
        return value.dtype.str, value.shape, value.tobytes()
    return struct.pack(">d", value) if isinstance(value, float) else value
