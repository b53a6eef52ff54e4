"""Plain curves from the beginning to the end of a fit, each a schedule."""

from __future__ import annotations

import math
import sys

from .clock import Time
from .errors import ArgumentError
from .schedule import Argument, Length, Schedule, Share, as_written, factor_of, made, share_of, span_of


def constant(factor: float = 1.0) -> Schedule:
    """Return the schedule that stays at ``factor``.

    Args:
        factor: The factor, at least 0.

    Raises:
        ArgumentError: The factor is not a finite number of at least 0.

    Example:
        >>> constant()(0.7)
        1.0
    """
    value = factor_of("constant(factor=)", factor, "constant(factor=1.0)")
    return Schedule("constant", {"factor": value}, lambda _: value)


def linear(end: float = 0.0, start: float = 1.0) -> Schedule:
    """Return the straight line from ``start`` at the beginning to ``end`` at the end of the fit.

    Args:
        end: Factor at progress 1, at least 0.
        start: Factor at progress 0, at least 0.

    Raises:
        ArgumentError: A factor is not a finite number of at least 0.

    Example:
        >>> [linear()(k / 4) for k in range(5)]
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    last = factor_of("linear(end=)", end, "linear(end=0.0)")
    first = factor_of("linear(start=)", start, "linear(start=1.0)")
    return Schedule("linear", {"end": last, "start": first}, lambda progress: first + (last - first) * progress)


def cosine(end: float = 0.0, start: float = 1.0) -> Schedule:
    """Return the half cosine from ``start`` to ``end``: Loshchilov and Hutter, SGDR (2017), equation 5, without restarts.

    Args:
        end: Factor at progress 1, at least 0.
        start: Factor at progress 0, at least 0.

    Raises:
        ArgumentError: A factor is not a finite number of at least 0.

    Example:
        >>> [round(cosine()(k / 4), 3) for k in range(5)]
        [1.0, 0.854, 0.5, 0.146, 0.0]
    """
    last = factor_of("cosine(end=)", end, "cosine(end=0.0)")
    first = factor_of("cosine(start=)", start, "cosine(start=1.0)")
    height = (first - last) / 2
    return Schedule(
        "cosine", {"end": last, "start": first}, lambda progress: last + height * (1 + math.cos(math.pi * progress))
    )


def polynomial(power: float = 1.0, end: float = 0.0, start: float = 1.0) -> Schedule:
    """Return ``end + (start - end) * (1 - progress) ** power``, as torch's ``PolynomialLR`` (whose ``end`` is 0).

    Args:
        power: The exponent, above 0: 1 is the straight line, 2 falls fast and then slowly.
        end: Factor at progress 1, at least 0.
        start: Factor at progress 0, at least 0.

    Raises:
        ArgumentError: A factor is not a finite number of at least 0, or the power is not above 0.

    Example:
        >>> [polynomial(2)(k / 4) for k in range(5)]
        [1.0, 0.5625, 0.25, 0.0625, 0.0]
    """
    last = factor_of("polynomial(end=)", end, "polynomial(2, end=0.0)")
    first = factor_of("polynomial(start=)", start, "polynomial(2, start=1.0)")
    if isinstance(power, bool) or not isinstance(power, (int, float)) or not 0 < power <= sys.float_info.max:
        raise ArgumentError("polynomial(power=)", got=power, takes="a finite number above 0", example="polynomial(2)")
    exponent = float(power)
    return Schedule(
        "polynomial",
        {"power": exponent, "end": last, "start": first},
        lambda progress: last + (first - last) * (1 - progress) ** exponent,
    )


def inverse_sqrt(timescale: Length) -> Schedule:
    """Return the decay ``1 / sqrt(1 + elapsed / timescale)``, which has no end of its own.

    The schedule of the Transformer is ``warmup("4000ba", then=inverse_sqrt("4000ba"))``: at step k after the warmup it
    is ``sqrt(4000 / k)``.

    Args:
        timescale: When it has fallen to ``1 / sqrt(2)``: a time such as "4000ba", which may be longer than the fit, or
            a share, above 0 and below 1, of the fit or of the stretch that it is given in a warmup or join.

    Raises:
        ArgumentError: The timescale is none of these.

    Source: Vaswani et al., arXiv:1706.03762, section 5.3; ``get_inverse_sqrt_schedule`` of Hugging Face.

    Example:
        >>> [round(inverse_sqrt("0.25dur")(k / 4), 3) for k in range(5)]
        [1.0, 0.707, 0.577, 0.5, 0.447]
    """
    span = span_of("inverse_sqrt(timescale=)", timescale, "inverse_sqrt('4000ba')")
    arguments: dict[str, Argument] = {"timescale": as_written(span)}

    def bound(share: Share) -> Schedule:
        scale = share_of(span, share)
        return Schedule("inverse_sqrt", arguments, lambda progress: 1 / math.sqrt(1 + progress / scale))

    return made("inverse_sqrt", arguments, bound, not isinstance(span, Time))
