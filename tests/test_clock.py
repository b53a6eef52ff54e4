"""Time and the clock it is read against."""

import pickle
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thawline.engine import ArgumentError, Clock, Time


@pytest.mark.parametrize(
    "text, value, unit",
    [
        ("3ep", 3, "ep"), ("200ba", 200, "ba"), ("5000sp", 5000, "sp"), ("0.5dur", 0.5, "dur"), (".5dur", 0.5, "dur"),
        (3, 3, "ep"), (" 2 ep ", 2, "ep"), ("1e3ba", 1000, "ba"), ("2.0ep", 2, "ep"), ("1dur", 1.0, "dur"), (0, 0, "ep"),
    ],
)  # fmt: skip
def test_a_time_is_read(text: str | int, value: float, unit: str) -> None:
    """Text in each of the units, and an int for epochs."""
    time = Time(text)
    assert (time.value, time.unit) == (value, unit)
    assert Time(time) == time == Time(str(time))


@pytest.mark.parametrize(
    "text",
    ["", "3", "ep", "-1ep", "3 epochs", "1.5ep", "0.5ba", "nanep", "infdur", "1e999dur", -1, True, 1.5, None, "9" * 99],
)
def test_what_is_no_time_is_refused(text: object) -> None:
    """The error lists the forms a time takes."""
    with pytest.raises(ArgumentError, match=r"^Time takes .* Write: Time\("):
        Time(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", [10**16, 10**400, pytest.param(10**5000, id="10**5000"), "1e400ba", "1e300sp", f"1e{'9' * 40}ep", "1e16dur"]
)
def test_a_time_beyond_all_training_is_refused(text: str | int) -> None:
    """Amounts are divided as floats, so they are bounded, and the error can be shown whatever it got."""
    with pytest.raises(ArgumentError, match=r"^Time takes a time of at most 1e\+15, got .* Write: Time\("):
        Time(text)


@given(st.integers(0, 10**15), st.sampled_from(["ep", "ba", "sp"]))
def test_a_time_survives_its_text(value: int, unit: str) -> None:
    """What is printed is what is read."""
    time = Time(f"{value}{unit}")
    assert Time(str(time)) == time
    assert pickle.loads(pickle.dumps(time)) == time


def test_each_unit_reads_its_own_count() -> None:
    """Epochs, batches, samples and the share of the duration are told apart."""
    clock = Clock(epoch=2, batch=25, batch_in_epoch=5, sample=400, progress=0.25, batches_per_epoch=10)
    assert Time("1ba").elapsed(clock) == 25
    assert Time("1sp").elapsed(clock) == 400
    assert Time("1dur").elapsed(clock) == 0.25
    assert Time("1ep").elapsed(clock) == 2.5
    assert Time("1ep").elapsed(Clock(epoch=2, batch_in_epoch=5)) == 2


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 40))
def test_a_share_is_crossed_as_often_as_it_fits(epochs: int, length: int, parts: int) -> None:
    """A fit of n batches crosses 1/m of its duration min(n, m) times or, where m > n, once a batch: none is lost to rounding."""
    duration, share = Time(epochs), Time(f"{1 / parts!r}dur")
    clock, crossings = Clock(batches_per_epoch=length), 0
    for _ in range(epochs):
        for _ in range(length):
            before, clock = clock, clock.after_batch(samples=1, duration=duration)
            crossings += share.crossed(before, clock)
        clock = clock.after_epoch(duration=duration)
    assert crossings == min(parts, epochs * length)
    assert share.count(clock) == parts


@given(st.integers(1, 20), st.integers(1, 20))
def test_progress_moves_every_batch_in_each_unit(epochs: int, length: int) -> None:
    """Step k of n stands at exactly k / n, whether the duration counts epochs, batches or samples."""
    total = epochs * length
    for duration in (Time(epochs), Time(f"{total}ba"), Time(f"{total * 4}sp")):
        clock = Clock(batches_per_epoch=length)
        for k in range(1, total + 1):
            clock = clock.after_batch(samples=4, duration=duration)
            assert clock.progress == k / total == float(Fraction(k, total))
            if not k % length:
                clock = clock.after_epoch(duration=duration)
                assert clock.progress == k / total
        assert (clock.epoch, clock.batch, clock.batch_in_epoch, clock.sample) == (epochs, total, 0, total * 4)


def test_progress_waits_for_the_epoch_where_its_length_is_unknown() -> None:
    """An iterable that does not say how long it is moves progress at epoch ends: the next epoch may be longer."""
    duration = Time("2ep")
    clock = Clock().after_batch(samples=1, duration=duration).after_batch(samples=1, duration=duration)
    assert clock.progress == 0.0
    clock = clock.after_epoch(duration=duration)
    assert (clock.progress, clock.batches_per_epoch) == (0.5, 0)
    assert clock.after_batch(samples=1, duration=duration).progress == 0.5


def test_progress_ends_at_one() -> None:
    """A batch that overshoots a duration in samples does not overshoot progress."""
    assert Clock().after_batch(samples=64, duration=Time("50sp")).progress == 1.0


def test_reached_and_crossed() -> None:
    """A time is reached once and for all, and crossed in the tick in which a multiple of it lies."""
    clocks = [Clock(batch=k) for k in range(7)]
    assert [Time("3ba").reached(clock) for clock in clocks] == [False] * 3 + [True] * 4
    assert [Time("3ba").crossed(a, b) for a, b in pairwise(clocks)] == [False, False, True] * 2


def test_every_zero_is_refused() -> None:
    """Nothing happens every zero batches."""
    with pytest.raises(ArgumentError, match="a time above zero"):
        Time("0ba").count(Clock())


def test_a_clock_does_not_change() -> None:
    """Each tick makes another one."""
    with pytest.raises(AttributeError):
        Clock().batch = 3  # type: ignore[misc]
