"""What a backward costs for any set of trainable parameters, from the graph of one forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from attrs import define, field
from torch import Tensor
from torch.autograd.graph import Node

Mask: TypeAlias = tuple[bool, ...]

# Each gradient of a product of matrices, its last two operands, is such a product itself and costs the same.
_PRODUCTS = frozenset({"MmBackward0", "AddmmBackward0", "BmmBackward0", "BaddbmmBackward0"})
_CONVOLUTION = "ConvolutionBackward0"


@define(eq=False)
class BackwardCost:
    """The operations of the backward of ``loss``, for any set of parameters whose gradients are wanted.

    A node of the graph costs what the gradients that are wanted of it cost, whatever the rest of the graph does. So a
    backward is run only where a node is asked for gradients that it was not asked for before; otherwise the costs
    of the nodes are added up.

    Args:
        loss: A loss on which everything that may train depends; its graph is kept.
        parameters: The parameters by name.

    Example:
        >>> net = torch.nn.Sequential(*(torch.nn.Linear(3, 3, device="meta") for _ in range(9)))
        >>> cost = BackwardCost(net(torch.zeros(5, 3, device="meta")).sum(), dict(net.named_parameters()))
        >>> cost.of({"0.weight"}), cost.of({"8.weight"}), cost.of({"4.weight", "7.weight"}), cost.runs
        (810, 90, 540, 1)
    """

    loss: Tensor
    parameters: Mapping[str, Tensor]
    runs: int = field(init=False, default=0)
    whole: int = field(init=False, default=0)
    """The operations of a backward to all of the parameters, as they were counted."""
    _nodes: list[Node] = field(init=False, factory=list)
    _edges: list[tuple[int | None, ...]] = field(init=False, factory=list)
    _leaf: dict[int, int] = field(init=False, factory=dict)
    _costs: dict[tuple[int, Mask], int] = field(init=False, factory=dict)
    _spent: dict[int, int] = field(init=False, factory=dict)
    _free: frozenset[int] = field(init=False, default=frozenset())

    def __attrs_post_init__(self) -> None:
        if self.loss.grad_fn is None:
            return
        place: dict[Node, int] = {}
        for node in _children_first(self.loss.grad_fn):
            place[node] = len(self._nodes)
            self._edges.append(tuple(None if child is None else place[child] for child, _ in node.next_functions))
            self._nodes.append(node)
            variable = getattr(node, "variable", None)
            if variable is not None:
                self._leaf[place[node]] = id(variable)
        self.whole = self._run(list(self.parameters))  # the widest masks, from which those of products follow
        self._free = frozenset(index for index, spent in self._spent.items() if not spent)  # also of narrower ones

    def of(self, trainable: frozenset[str] | set[str]) -> int:
        """Return the operations of a backward to ``trainable``.

        Raises:
            KeyError: There is no such parameter.
        """
        return self._cost(sorted(trainable))

    def _cost(self, names: list[str]) -> int:
        masks = self._masks(names)
        known = [self._known(index, mask) for index, mask in masks.items()]
        if None in known:
            self._run(names)
            known = [self._known(*each) for each in masks.items()]
        return sum(each for each in known if each is not None)

    def _masks(self, names: list[str]) -> dict[int, Mask]:
        """Return which gradients are wanted of each node that takes part."""
        wanted = {id(self.parameters[name]) for name in names}
        reaches: list[bool] = []
        masks: dict[int, Mask] = {}
        for index, edges in enumerate(self._edges):
            mask = tuple(child is not None and reaches[child] for child in edges)
            reaches.append(any(mask) or self._leaf.get(index) in wanted)
            if any(mask):
                masks[index] = mask
        return masks

    def _known(self, index: int, mask: Mask) -> int | None:
        return 0 if index in self._free else self._costs.get((index, mask))

    def _run(self, names: list[str]) -> int:
        """Run a backward, and write down what each node costs; return its operations."""
        from torch.utils.flop_counter import FlopCounterMode

        masks = self._masks(names)
        self.runs += 1
        counter = FlopCounterMode(display=False)
        self._spent = dict.fromkeys(masks, 0)
        handles = [handle for index in masks for handle in self._watch(index, counter)]
        try:
            with counter:
                torch.autograd.grad(
                    self.loss, [self.parameters[name] for name in names], allow_unused=True, retain_graph=True
                )
        finally:
            for handle in handles:
                handle.remove()
        for index, mask in masks.items():
            self._costs[index, mask] = spent = self._spent[index]
            parts = _parts(self._nodes[index], len(mask))
            if whole := _part(parts, mask):
                for other in _masks_of(len(mask)):
                    self._costs[index, other] = spent * _part(parts, other) // whole
        return int(counter.get_total_flops())

    def _watch(self, index: int, counter: Any) -> tuple[Any, Any]:
        node, spent = self._nodes[index], self._spent

        def before(_: Any) -> None:
            spent[index] -= counter.get_total_flops()

        def after(_: Any, __: Any) -> None:
            spent[index] += counter.get_total_flops()

        return node.register_prehook(before), node.register_hook(after)


def _parts(node: Node, edges: int) -> tuple[int, ...]:
    """Return in which proportion the gradients of a node cost, as far as its kind tells; zeros where it does not."""
    if node.name() in _PRODUCTS:
        return (*(0,) * (edges - 2), 1, 1)
    if node.name() == _CONVOLUTION:  # the weight's is counted over all pairs of channels, the input's within groups
        return (1, int(node._saved_groups), *(0,) * (edges - 2))  # type: ignore[attr-defined]  # of this kind of node
    return (0,) * edges


def _part(parts: tuple[int, ...], mask: Mask) -> int:
    return sum(part for part, wanted in zip(parts, mask, strict=True) if wanted)


def _masks_of(edges: int) -> Iterator[Mask]:
    for number in range(1 << edges):
        yield tuple(bool(number >> place & 1) for place in range(edges))


def _children_first(root: Node) -> Iterator[Node]:
    """Yield the nodes of a graph, each once and after those that it hands gradients to; without recursion."""
    seen = {root}
    stack = [(root, iter(root.next_functions))]
    while stack:
        node, edges = stack[-1]
        child = next((child for child, _ in edges if child is not None and child not in seen), None)
        if child is None:
            stack.pop()
            yield node
        else:
            seen.add(child)
            stack.append((child, iter(child.next_functions)))
