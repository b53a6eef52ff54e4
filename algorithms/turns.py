"""Taking turns: some parts always train, and of the other layers different ones in each interval."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from typing_extensions import override

from ..engine import (
    Algorithm,
    Event,
    LayerError,
    LayerMap,
    Stage,
    State,
    Time,
    derive_seed,
    get_logger,
    warn,
)
from .train_only import all_but, rest_of, warn_of_frozen_trunk

log = get_logger(__name__)


def shuffled(count: int, seed: int, *parts: object) -> list[int]:
    """Return 0 to ``count - 1`` in an order that is a pure function of ``seed`` and ``parts``; no generator moves.

    Example:
        >>> shuffled(6, 0, "me", 1), shuffled(6, 0, "me", 2)
        ([4, 0, 2, 3, 1, 5], [3, 2, 0, 4, 1, 5])
        >>> shuffled(3, 0, "me", 1) == shuffled(3, 1, "me", 1), shuffled(0, 0)
        (False, [])
    """
    return sorted(range(count), key=lambda each: derive_seed(seed, *parts, each))


class Turns(Algorithm):
    """Hold all but what always trains, and release other layers at each interval; subclasses choose which.

    What trains is a pure function of the clock, the run's seed and the owner's name.

    Args:
        every: Length of a turn.
        always: Selectors of what trains all the time; a layer that the model does not have is passed over.
        turn: The number of the running turn, from 0.
        active: The layers whose turn it is.

    Example:
        >>> from torch.optim import SGD
        >>> from thawline.algorithms import BlockCycle
        >>> from thawline.engine import Clock, ParameterLedger
        >>> from thawline.engine.testing import tiny_models
        >>> model = tiny_models()["residual"]()
        >>> state = State(model, ParameterLedger(model, SGD), duration="12ba")
        >>> turns = BlockCycle("2ba", order="ascending", always=("head", "*.bias"))
        >>> turns.apply(Event.FIT_START, state)
        >>> turns.active, [each for each in state.layers["blocks[0]"][0].parameters if each in state.ledger.trainable]
        (('stem',), ['blocks.0.norm.bias', 'blocks.0.linear.bias'])
        >>> state.clock = Clock(batch=2)
        >>> turns.match(Event.BATCH_START, state), turns.turn
        (True, 0)
        >>> turns.apply(Event.BATCH_START, state)
        >>> turns.state_dict(), turns.match(Event.BATCH_START, state), turns.match(Event.FIT_START, state)
        ({'turn': 1, 'active': ['blocks[0]']}, False, True)
        >>> [each for each in sorted(state.ledger.trainable) if not each.endswith("bias")]
        ['blocks.0.linear.weight', 'blocks.0.norm.weight', 'head.weight']
    """

    stage: ClassVar[Stage] = Stage.TRAINABILITY

    every: Time
    always: tuple[str, ...]
    turn: int
    active: tuple[str, ...]

    def __attrs_post_init__(self) -> None:
        self.events = frozenset({Event.FIT_START, Event.EPOCH_START if self.every.unit == "ep" else Event.BATCH_START})

    @abstractmethod
    def candidates(self, layers: LayerMap) -> list[str]:
        """Return the layers that may take turns, in depth order."""

    @abstractmethod
    def choose(self, candidates: Sequence[str], turn: int, seed: int) -> tuple[str, ...]:
        """Return the layers whose turn it is."""

    @abstractmethod
    def leaving(self, chosen: Sequence[str]) -> tuple[str, ...]:
        """Return which of the active layers to freeze, and so to rid of their optimizer state, when others are chosen."""

    @abstractmethod
    def idle(self, candidates: Sequence[str], state: State) -> str | None:
        """Return what the fit is too short for; None where it is not."""

    @override
    def match(self, event: Event, state: State) -> bool:
        """Return whether the fit begins, or a turn."""
        return event is Event.FIT_START or self.every.count(state.clock) != self.turn

    @override
    def apply(self, event: Event, state: State) -> None:
        """Hold all that does not always train; freeze the layers whose turn is over, and release the next."""
        ledger, layers = state.ledger, state.layers
        kept = self._kept(state)
        candidates = [each for each in self.candidates(layers) if not kept.issuperset(layers.parameters(each))]
        self.turn = self.every.count(state.clock)
        with ledger.at_once():
            if event is Event.FIT_START:
                self._begin(state, candidates, kept)
            chosen = self.choose(candidates, self.turn, state.seed)
            leaving = self.leaving(chosen)
            if leaving:
                ledger.freeze(self._selectors(layers, leaving, kept), owner=self.owner)
            joining = [each for each in chosen if each in leaving or each not in self.active]
            if joining:
                ledger.thaw(self._selectors(layers, joining, kept), owner=self.owner)
        self.active = chosen
        log.info("turn", number=self.turn, layers=list(chosen), epoch=state.clock.epoch, batch=state.clock.batch)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the number of the running turn, and whose it is."""
        return {"turn": self.turn, "active": list(self.active)}

    @override
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned.

        Example:
            >>> from thawline.algorithms import LISA
            >>> turns = LISA("1ep")
            >>> turns.load_state_dict({"turn": 3, "active": ["blocks[1]"]})
            >>> turns.turn, turns.active
            (3, ('blocks[1]',))
            >>> sorted(each.name for each in turns.events), sorted(each.name for each in LISA("9ba").events)
            (['EPOCH_START', 'FIT_START'], ['BATCH_START', 'FIT_START'])
        """
        self.turn, self.active = int(saved["turn"]), tuple(saved["active"])

    def _begin(self, state: State, candidates: Sequence[str], kept: frozenset[str]) -> None:
        r"""Hold all but what always trains, and say what does not go together.

        Example:
            >>> import warnings
            >>> from torch.optim import SGD
            >>> from thawline.algorithms import LISA, BlockCycle
            >>> from thawline.engine import ParameterLedger
            >>> from thawline.engine.testing import tiny_models
            >>> model = tiny_models()["residual"]()
            >>> state = State(model, ParameterLedger(model, SGD), duration="12ba")
            >>> with warnings.catch_warnings(record=True) as told:
            ...     warnings.simplefilter("always")
            ...     for each in (BlockCycle("1ba"), LISA("2ba", layers=1), LISA("12ba", layers=1)):
            ...         each.apply(Event.FIT_START, state)
            >>> print(*(each.message for each in told), sep="\n")
            LISA and BlockCycle each hold what the other releases: a layer trains only where their turns meet. Leave one out.
            LISA and BlockCycle each hold what the other releases: a layer trains only where their turns meet. Leave one out.
            LISA(every='12ba') draws only once: the fit ends after 12ba. Write a shorter interval, such as LISA(every='0.02dur').
            >>> BlockCycle(always="*").apply(Event.FIT_START, state)
            Traceback (most recent call last):
            thawline.engine.errors.LayerError: BlockCycle needs layers to take turns, and ['*'] leaves none:
            ...
        """
        name = type(self).__name__
        if not candidates:
            raise LayerError(
                f"{name} needs layers to take turns, and {list(self.always)} leaves none:\n{state.layers}\nPass them: "
                "trainer.fit(…, layers={'stem': 'embeddings', 'blocks': 'encoder.layer.*', 'head': 'classifier'})"
            )
        kinds = {each.__name__ for each in Turns.__subclasses__()}
        owners = {owner for each in candidates for owner in state.ledger.owners(state.layers.parameters(each)[0])}
        if others := sorted(owner for owner in owners - {self.owner} if owner.partition("#")[0] in kinds):
            warn(
                f"{self.owner} and {', '.join(others)} each hold what the other releases: a layer trains only where their "
                "turns meet. Leave one out."
            )
        self.active = ()
        warn_of_frozen_trunk(state, name)
        state.ledger.freeze(all_but(state.layers, kept), owner=self.owner)
        if why := self.idle(candidates, state):
            warn(
                f"{name}(every='{self.every}') {why}: the fit ends after {state.duration}. "
                f"Write a shorter interval, such as {name}(every='0.02dur').",
            )

    def _kept(self, state: State) -> frozenset[str]:
        """Return the names of what always trains."""
        layers = state.layers
        there = [each for each in self.always if not layers.names_layer(each) or layers.parameters(each)]
        return frozenset(state.ledger.select(there)) if there else frozenset()

    @staticmethod
    def _selectors(layers: LayerMap, names: Sequence[str], kept: frozenset[str]) -> list[str]:
        """Return selectors of what takes turns in the layers.

        Example:
            >>> from thawline.engine.testing import tiny_models
            >>> Turns._selectors(LayerMap(tiny_models()["residual"]()), ["stem", "head"], frozenset({"head.bias"}))
            ['stem', 'head.weight']
        """
        return [select for name in names for layer in layers[name] for select in rest_of(layer, kept)]
