"""A model whose weights, gradients and moments lie in shards over the ranks for the length of a fit: torch's FSDP2, driven.

``fully_shard`` exchanges parameters for shards of them, under their names. Each block of the :class:`LayerMap` that is a
module of its own is a group: gathered before its forward pass, let go of after it. What is left, tied weights among it, is
the root's group. At the end the model gets its own parameters back, whole, and all that torch put on its modules is taken off.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .distributed import FullyShard, Rows, Team, refuse_sparse
from .errors import DistributedError, shorten, with_article
from .layers import LayerMap
from .ledger import ParameterLedger
from .shard_errors import REPLICATE
from .shards import sharded_in, unsharded

_HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
_SHOWN = 4


@frozen(eq=False)
class _Place:
    """An attribute of a module that is a parameter, and the parameter's name in the model."""

    module: nn.Module
    attribute: str
    name: str


@frozen(eq=False)
class _Whole:
    """A parameter of the user's, which waits for the end of the fit, and where and how it lay."""

    parameter: nn.Parameter
    device: torch.device
    stride: tuple[int, ...]

    @classmethod
    def of(cls, parameter: nn.Parameter) -> _Whole:
        """Return a parameter as it is."""
        return cls(parameter, parameter.device, parameter.stride())

    def leave(self) -> None:
        """Let go of the memory. Whoever computes with the parameter itself, and not with the model's, sees NaN in it."""
        data = self.parameter.data
        blank = data.new_full((), float("nan") if data.is_floating_point() or data.is_complex() else 0)
        self.parameter.data = blank.expand(data.shape)

    def come_back(self, values: Tensor) -> None:
        """Take over all of the values."""
        data = values.to(self.device)
        if data.stride() != self.stride:
            data = torch.empty_strided(data.shape, self.stride, dtype=data.dtype, device=data.device).copy_(data)
        self.parameter.data = data


class Shards:
    """The weights and gradients of a fit in shards, with the methods of :class:`GradientBuckets`.

    Args:
        team: The ranks.
        ledger: What trains; of the whole model.
        device: What computes.
    """

    def __init__(self, team: Team, ledger: ParameterLedger, device: torch.device) -> None:
        assert isinstance(team.chosen, FullyShard), "chosen by what the Trainer was given"
        self._team, self._ledger, self._device, self._chosen = team, ledger, device, team.chosen
        self._groups: list[tuple[Any, list[_Place]]] = []
        self._places: list[_Place] = []
        self._wholes: dict[str, _Whole] = {}
        self._modules: list[tuple[nn.Module, type, set[str]]] = []
        self._handles: list[Any] = []
        self._heard: dict[int, Tensor] = {}
        self._arrived: set[str] = set()
        self._order: list[int] = []
        self._listens = True

    # -- there and back ----------------------------------------------------------------------------------------

    def deal(self) -> None:
        """Shard the model, once surgery is done: all ranks call this, with the same model.

        Raises:
            DistributedError: A parameter cannot be sharded.
            OptimizerError: The optimizer does not know shards.
        """
        model = self._ledger.model
        _check(self._ledger)
        # Here, not above: a process that trains alone does not load them.
        from torch.distributed.tensor import Shard, distribute_tensor

        mesh = self._team.mesh(self._device)
        self._ledger.check_on_shards(
            lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None), self._team.world
        )
        groups = [*_blocks(model, self._ledger.layers), model]
        self._modules = [(module, type(module), set(vars(module))) for module in model.modules()]
        self._find_places(groups)
        try:
            self._shard(mesh)
            self._modules = [(module, kind, set(vars(module)) - before) for module, kind, before in self._modules]
            # torch reads off the dtypes of gradients here, of what requires one: later, that may be other parameters.
            root: Any = model
            self._ledger.follow_exchange(root._get_fsdp_state()._lazy_init if self._chosen.mixed_precision else None)
        except (AssertionError, NotImplementedError, ValueError) as error:
            raise DistributedError(f"torch's fully_shard refuses the model: {error}. Write: {REPLICATE}.") from error
        for number, (module, places) in enumerate(self._groups):
            self._handles.append(module.register_forward_pre_hook(self._before(number, places)))
            self._handles.append(module.register_forward_hook(self._after(number, places), prepend=True))

    def gather(self) -> None:
        """Give the model its own parameters back, with all of the values they have come to: all ranks call this."""
        if not self._wholes:
            return
        self.rest()
        ledger = self._ledger
        with torch.no_grad():
            for name, whole in self._wholes.items():
                whole.come_back(unsharded(ledger.parameters[name].detach()))
        self.close()
        for module, kind, added in self._modules:
            _bare(module, kind, added)
        for place in self._places:
            setattr(place.module, place.attribute, self._wholes[place.name].parameter)
        self._wholes = {}
        ledger.follow_exchange()

    def rest(self) -> None:
        """Let go of what is gathered, such as after a forward pass that no backward pass follows."""
        for module, _ in self._groups:
            module.reshard()

    def close(self) -> None:
        """Take our hooks off the model; nothing is said to the other ranks."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._heard = [], {}

    def gathered(self, tree: dict[str, Any]) -> dict[str, Tensor]:
        """Return whole, on the CPU, what lies in shards in a tree, by where it stands; on other ranks than the first nothing."""
        found = sharded_in(tree)
        self._team.compare("what a checkpoint holds", repr(list(found)), lambda: dict.fromkeys(found, True))
        known: dict[int, Tensor] = {}
        for tensor in found.values():
            if id(tensor) not in known:
                full = unsharded(tensor.detach())
                known[id(tensor)] = full.cpu() if self._team.first else full[:0]
        return {place: known[id(tensor)] for place, tensor in found.items()}

    # -- a batch -----------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """Do nothing: torch's shards follow ``requires_grad`` themselves."""

    def arm(self) -> None:
        """Do nothing: gradients are reduced with each microbatch, so that none is held whole."""

    def settle(self, row: Sequence[float]) -> Rows:
        """Agree that all ranks ran the same parts of the model, and on what got no gradient.

        Args:
            row: Up to four numbers.

        Returns:
            The rows of all ranks, in order.

        Raises:
            DistributedError: They did not: then they have exchanged parts of different blocks.
        """
        self._check_wholes()
        ledger = self._ledger
        trainable = [name for name in ledger.parameters if name in ledger.trainable]
        absent = [name for name in trainable if name not in self._arrived]
        mask, order = _checksum(absent), self.order()
        rows = self._team.tell("BEFORE_STEP", ledger.clock.batch, mask, order, *row)
        self.check_order([each[1] for each in rows])
        if any(each[0] != mask for each in rows):
            absent = sorted(set(absent).intersection(*self._team.exchange(absent)))
        ledger.put_gradients([ledger.parameters[name] for name in absent], [None] * len(absent))
        self._arrived.clear()
        return [each[2:] for each in rows]

    def order(self) -> float:
        """Return a number that is equal on ranks that ran the same parts of the model since the last :meth:`check_order`."""
        return _checksum(self._order)

    def check_order(self, orders: Sequence[float]) -> None:
        """Check that all ranks ran the same parts of the model in the same order.

        Raises:
            DistributedError: Names the first part that differs.
        """
        if len(set(orders)) > 1:
            everybody = self._team.exchange([self._title(each) for each in self._order])
            rank = next(rank for rank, each in enumerate(everybody) if each != everybody[0])
            got, wanted = (
                [each for each in part if part.count(each) != other.count(each)] or part
                for part, other in ((everybody[rank], everybody[0]), (everybody[0], everybody[rank]))
            )
            raise DistributedError(
                f"the ranks ran different parts of the model: rank {rank} ran {shorten(got[:_SHOWN])}, rank 0 {shorten(wanted[:_SHOWN])}. "
                f"Blocks in shards are gathered by all ranks together, whatever each one's data ask for. Write: {REPLICATE}."
            )
        self._order.clear()

    def stand_in(self, outputs: object, loss_of: Callable[[], Tensor]) -> None:
        """Do the backward pass of a forward pass whose samples count nothing, which other ranks wait for.

        Args:
            outputs: What the model returned.
            loss_of: Returns their loss. It says which outputs the others go back through; its value may be NaN.
        """
        known = isinstance(outputs, (Tensor, Mapping, tuple, list))
        given = tree_leaves(outputs if known else getattr(outputs, "__dict__", None) or loss_of())
        found = [each for each in given if isinstance(each, Tensor) and each.requires_grad]
        if len(found) > 1:
            reached = _reached(loss_of())
            found = [each for each in found if each.grad_fn in reached]
        self._listens = False
        try:
            torch.autograd.backward(found, [torch.zeros_like(each) for each in found])
        finally:
            self._listens = True

    # -- inside ------------------------------------------------------------------------------------------------

    def _title(self, number: int) -> str:
        group = self._groups[number][0]
        return next(name for name, module in self._ledger.model.named_modules() if module is group) or "the model"

    def _check_wholes(self) -> None:
        """Refuse a loss that was computed with a parameter which the user kept from before the fit."""
        name = next((name for name, whole in self._wholes.items() if whole.parameter.grad is not None), None)
        if name is not None:
            raise DistributedError(
                f"the loss was computed with {name!r} as it was before the fit, such as from a list(model.parameters()): the model computes with shards "
                f"in its place, and that one is empty. Write: weight_decay= of the optimizer for a penalty on weights, or {REPLICATE}."
            )

    def _find_places(self, groups: Sequence[nn.Module]) -> None:
        """Note every attribute that is a parameter, and in which group it lies."""
        model, parameters = self._ledger.model, self._ledger.parameters
        names = {id(each): name for name, each in parameters.items()}
        self._places = [
            _Place(module, attribute, names[id(each)])
            for module in model.modules()
            for attribute, each in module._parameters.items()
            if each is not None
        ]
        self._wholes = {name: _Whole.of(each) for name, each in parameters.items()}
        inside = {id(part): number for number, group in enumerate(groups[:-1]) for part in group.modules()}
        of: list[list[_Place]] = [[] for _ in groups]
        for place in self._places:
            of[inside.get(id(place.module), -1)].append(place)
        self._groups = list(zip(groups, of, strict=True))
        self._ledger.put_gradients([*parameters.values()], [None] * len(parameters))
        for parameter in parameters.values():
            if not parameter.is_contiguous():
                parameter.data = parameter.data.contiguous()

    def _shard(self, mesh: Any) -> None:
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        chosen, model = self._chosen, self._ledger.model
        offloads = chosen.offload and self._device.type != "cpu"
        for module, places in self._groups:
            wide = self._wholes[places[0].name].parameter.dtype if places else torch.float32
            mixed: dict[str, Any] = {}
            if chosen.mixed_precision is not None:
                mixed = {"param_dtype": torch.bfloat16, "reduce_dtype": wide}
                mixed |= {"output_dtype": wide} if module is model else {}
            group: Any = fully_shard(
                module, mesh=mesh, reshard_after_forward=chosen.reshard, mp_policy=MixedPrecisionPolicy(**mixed),
                offload_policy=CPUOffloadPolicy() if offloads else OffloadPolicy(),
            )  # fmt: skip
            # Losses are scaled by each rank's share of the batch, so gradients are summed. A rank on which a parameter
            # got none adds zeros, else torch would add up gradients of different parameters.
            group.set_gradient_divide_factor(1.0)
            group.set_force_sum_reduction_for_comms(True)
            group.set_reduce_scatter_unused_params(True)
            for place in places:
                whole = self._wholes[place.name]
                whole.leave()
                # What the user wrote on a parameter, such as a factor that the optimizer reads.
                vars(getattr(place.module, place.attribute)).update(vars(whole.parameter))

    def _before(self, number: int, places: Sequence[_Place]) -> Callable[..., None]:
        def before(module: nn.Module, args: Any) -> None:  # noqa: ARG001 - what a hook is called with
            self._order.append(number)
            for place in places:
                parameter = getattr(place.module, place.attribute)
                if parameter.requires_grad and id(parameter) not in self._heard:
                    self._heard[id(parameter)] = parameter
                    self._handles.append(parameter.register_post_accumulate_grad_hook(self._arriving(place.name)))

        return before

    def _after(self, number: int, places: Sequence[_Place]) -> Callable[..., None]:
        def after(module: nn.Module, args: Any, outputs: Any) -> None:  # noqa: ARG001 - as above
            trains = any(getattr(place.module, place.attribute).requires_grad for place in places)
            if (
                trains
                and torch.is_grad_enabled()
                and not any(isinstance(each, Tensor) for each in tree_leaves(outputs))
            ):
                raise DistributedError(
                    f"{self._title(number)} returns {with_article(type(outputs).__name__)}, in which torch's fully_shard finds no tensor and does not "
                    f"see the backward pass come. Return a tensor, a tuple, or a dict such as {{'logits': …}}, or write {REPLICATE}."
                )

        return after

    def _arriving(self, name: str) -> Callable[[Tensor], None]:
        def arrived(parameter: Tensor) -> None:
            refuse_sparse(parameter.grad)
            if self._listens:
                self._arrived.add(name)

        return arrived


def _check(ledger: ParameterLedger) -> None:
    """Raise a DistributedError for what torch cannot shard."""
    for name, parameter in ledger.parameters.items():
        if not parameter.ndim:
            raise DistributedError(
                f"{name!r} is a single number without dimensions, which has no rows to share out. Write: nn.Parameter("
                f"torch.ones(1)) in the model, or {REPLICATE}."
            )
        if not parameter.numel():
            raise DistributedError(
                f"{name!r} has no elements, which cannot be shared out. Remove it from the model, or write {REPLICATE}."
            )
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise DistributedError(
                f"{name!r} has a hook on its gradient, which a gradient in shards would pass by. Change gradients in an "
                f"algorithm at Event.BEFORE_STEP, or write {REPLICATE}."
            )


def _blocks(model: nn.Module, layers: LayerMap) -> Iterator[nn.Module]:
    """Yield the modules of blocks that can be groups of their own: called as a whole, and sharing no weight with others."""
    users, known = _uses(model), dict(model.named_modules())
    for layer in layers.blocks:
        modules = [known[path] for path in layer.modules if path in known]
        for module in [part for each in modules for part in _called(each) if part is not model]:
            own = _uses(module)
            if own and all(users[key] == count for key, count in own.items()):
                yield module


def _uses(module: nn.Module) -> Counter[int]:
    """Return in how many places inside a module each parameter stands, by identity."""
    return Counter(id(each) for part in module.modules() for each in part._parameters.values() if each is not None)


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module, or the parts of one that is a mere list of them and cannot be called."""
    if type(module).forward is not nn.Module.forward:
        yield module
    else:
        for child in module.children():
            yield from _called(child)


def _bare(module: nn.Module, kind: type, added: set[str]) -> None:
    """Take off a module what ``fully_shard`` put on it; torch has no call for that."""
    from torch.distributed import _composable_state

    if type(module) is not kind:
        module.__class__ = kind
    for key in added:
        vars(module).pop(key, None)
    for table in _HOOKS:
        hooks: dict[int, Any] = getattr(module, table, {})
        for number, hook in list(hooks.items()):
            if (getattr(getattr(hook, "hook", hook), "__module__", None) or "").startswith("torch.distributed."):
                for other in _HOOKS:
                    getattr(module, other, {}).pop(number, None)
    _composable_state._module_state_mapping.pop(module, None)


def _reached(loss: Tensor) -> set[Any]:
    """Return the nodes of the graph that the backward pass of a loss goes through."""
    found: set[Any] = set()
    ahead = [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in found:
            found.add(node)
            ahead += [each for each, _ in node.next_functions]
    return found


def _checksum(value: object) -> float:
    return float(zlib.crc32(repr(value).encode())) if value else 0.0
