"""Homes: the optimizer and the group options that each parameter comes from."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from attrs import define, field
from torch import Tensor, nn
from torch.optim import Optimizer

from .errors import OptimizerError, SelectorError, shorten, with_article
from .layers import LayerMap
from .selectors import Selector, resolve

OptimizerFactory: TypeAlias = Callable[[Iterable[nn.Parameter]], Optimizer]
OptimizerLike: TypeAlias = (
    Optimizer | OptimizerFactory | Sequence[Optimizer] | Sequence[tuple[Selector, OptimizerFactory]]
)
MANAGED = frozenset({"params", "param_names"})
_EXAMPLE = "optimizer=partial(torch.optim.AdamW, lr=1e-4)"


@define(eq=False, slots=True)
class Home:
    """One parameter group as the user made it.

    Args:
        optimizer: Index of the optimizer.
        index: Place among all homes.
        template: The group's dictionary; while parameters of this home train, the live one of the first of them.
        lr: The base learning rate; None where the optimizer's groups have none.
        given: What else the group said when the user made it. Some optimizers count in their groups, so that
            ``options`` moves while this stays.
        replaced: As the user gave them, the options that an owner has set for some of its parameters.
    """

    optimizer: int
    index: int
    template: dict[str, Any]
    lr: float | None
    replaced: dict[str, float] = field(factory=dict, init=False)
    given: dict[str, Any] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.given = {key: value for key, value in self.options.items() if key != "lr"}

    def take(self, options: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
        """Return what of ``options`` the groups of this home have, and note what was given in its place."""
        mine = tuple(sorted((key, value) for key, value in options.items() if key in self.template))
        for key, _ in mine:
            self.replaced.setdefault(key, self.template[key])
        return mine

    @property
    def options(self) -> dict[str, Any]:
        """What the group says besides its parameters, as the user gave it."""
        return {key: value for key, value in self.template.items() if key not in MANAGED} | self.replaced


def settle(
    optimizer: OptimizerLike, parameters: Mapping[str, nn.Parameter], aliases: Mapping[str, str], layers: LayerMap
) -> tuple[tuple[Optimizer, ...], dict[str, Home]]:
    """Build the optimizers where factories are given, and find each parameter's home.

    Args:
        optimizer: An instance, several, a factory over parameters, or ``[(select, factory), …]`` where the first
            selector that matches a parameter takes it.
        parameters: All parameters by canonical name.
        aliases: Further names of tied parameters.
        layers: The model's layers.

    Raises:
        OptimizerError: It is none of these, needs a closure, holds foreign parameters or the same one twice,
            or the selectors leave parameters out.
    """
    floating = {name: each for name, each in parameters.items() if each.is_floating_point() or each.is_complex()}
    if isinstance(optimizer, Optimizer):
        optimizers: tuple[Optimizer, ...] = (optimizer,)
    elif callable(optimizer):
        optimizers = (_made(optimizer, floating),)
    elif isinstance(optimizer, Sequence) and optimizer and all(isinstance(each, Optimizer) for each in optimizer):
        optimizers = tuple(optimizer)  # type: ignore[arg-type]
    elif isinstance(optimizer, Sequence) and optimizer and all(_is_pair(each) for each in optimizer):
        optimizers = _partitioned(optimizer, floating, aliases, layers)  # type: ignore[arg-type]
    else:
        raise OptimizerError(
            f"optimizer= takes an optimizer, a factory over parameters or a list of (select, factory), "
            f"got {shorten(optimizer)}. Write: {_EXAMPLE}"
        )
    for each in optimizers:
        refuse_closure(each)
    return optimizers, _homes(optimizers, floating, parameters)


def home_of_new(
    name: str,
    parameter: nn.Parameter,
    beside: Home,
    *,
    homes: Mapping[str, Home],
    parameters: Mapping[str, nn.Parameter],
    selectors: Sequence[Selector],
    layers: LayerMap,
) -> Home:
    """Return the home of an attached parameter: its neighbor's, unless the optimizers' selectors send it elsewhere.

    A vector attached beside a matrix must not fall to Muon: where ``optimizer=[(select, factory), …]`` was given, the
    first selector that matches the new parameter decides, and of that optimizer's homes one with parameters of its kind.
    """
    for index, selector in enumerate(selectors):
        try:
            matched = name in resolve(selector, {name: parameter}, {}, layers).names
        except SelectorError:
            continue
        if matched:
            if beside.optimizer == index:
                return beside
            flat = parameter.ndim <= 1
            there = [(other, home) for other, home in homes.items() if home.optimizer == index]
            kin = [home for other, home in there if other in parameters and (parameters[other].ndim <= 1) is flat]
            return (kin or [home for _, home in there])[0]
    return beside


def selectors_of(optimizer: OptimizerLike) -> tuple[Selector, ...]:
    """Return the selectors of ``[(select, factory), …]``, none for other forms."""
    if isinstance(optimizer, Sequence) and all(_is_pair(each) for each in optimizer):
        return tuple(select for select, _ in optimizer)  # type: ignore[misc]
    return ()


def names_of(optimizers: Sequence[Optimizer]) -> tuple[str, ...]:
    """Return the optimizers' class names, numbered from the second of a kind on.

    Example:
        >>> weight = nn.Parameter(torch.zeros(1))
        >>> names_of([torch.optim.SGD([weight]), torch.optim.AdamW([weight]), torch.optim.SGD([weight])])
        ('SGD', 'AdamW', 'SGD 2')
    """
    kinds = [type(each).__name__ for each in optimizers]
    seen = [kinds[: index + 1].count(kind) for index, kind in enumerate(kinds)]
    return tuple(kind if count == 1 else f"{kind} {count}" for kind, count in zip(kinds, seen, strict=True))


def state_by_name(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """Return an optimizer's state: of parameters by name, and ``"shared"`` what lies under keys of the optimizer's own.

    ``"shared_on"`` is the kind of device on which each of the latter lies; a checkpoint's tensors come back on the CPU.

    Args:
        optimizer: The optimizer.
        names: Each parameter's name by its identity.

    Raises:
        OptimizerError: State of a tensor that is no parameter, or a parameter's state that is no dict.
    """
    state: dict[Any, Any] = {}
    shared: dict[Any, Any] = {}
    kind = type(optimizer).__name__
    for key, values in optimizer.state.items():
        if not isinstance(key, Tensor):
            shared[key] = values
            continue
        name = names.get(id(key))
        if name is None:
            raise OptimizerError(
                f"{kind}.state has a tensor of shape {tuple(key.shape)} for a key that is no parameter of the model, so a "
                f"checkpoint cannot name it. Keep it under a text: optimizer.state['{kind.lower()}'] = …"
            )
        if not isinstance(values, Mapping):
            raise OptimizerError(
                f"{kind}.state[{name!r}] is {with_article(type(values).__name__)}, and a parameter's state is a dict, so a checkpoint "
                "cannot hold it. Keep it under a text: optimizer.state[parameter] = {'value': …}"
            )
        state[name] = dict(values)
    return {"state": state, "shared": shared, "shared_on": [_device_type(each) for each in shared.values()]}


def _device_type(value: object) -> str:
    """Return the kind of device of the first tensor in a value off the CPU; ``"cpu"`` where there is none."""
    if isinstance(value, Tensor):
        return value.device.type
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return next((found for each in inside if (found := _device_type(each)) != "cpu"), "cpu")


def refuse_closure(optimizer: Optimizer) -> None:
    """Raise an OptimizerError where ``optimizer.step`` cannot be called without a closure."""
    step = inspect.signature(type(optimizer).step).parameters.get("closure")
    if isinstance(optimizer, torch.optim.LBFGS) or (step is not None and step.default is inspect.Parameter.empty):
        raise OptimizerError(
            f"{type(optimizer).__name__}.step needs a closure that computes the loss again, which microbatches and "
            f"gradient clipping cannot serve. Write: {_EXAMPLE}"
        )


def fresh_state(optimizer: Optimizer, parameter: nn.Parameter, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state that an optimizer gives a parameter when it is constructed (Adagrad); mostly empty.

    Step functions of such optimizers expect it, so a parameter that returns or is new must bring it.
    """
    try:
        twin = type(optimizer)([parameter], **known_options(optimizer, options))
    except (TypeError, ValueError):
        return {}
    return dict(twin.state.get(parameter, {}))


def known_options(optimizer: Optimizer, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a group's options that the optimizer's constructor takes (AdamW sets one that it does not)."""
    takes = inspect.signature(type(optimizer)).parameters
    anything = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in takes.values())
    return {key: value for key, value in options.items() if key in optimizer.defaults and (anything or key in takes)}


def over_twins(optimizer: OptimizerLike, twins: Mapping[int, nn.Parameter]) -> OptimizerLike:
    """Return what is ``optimizer`` for a model's twin.

    Args:
        optimizer: What :func:`settle` takes; left as it is.
        twins: The twin's parameters by the ``id`` of the model's.
    """
    if isinstance(optimizer, Optimizer):
        return _over_twins(optimizer, twins)
    if callable(optimizer):
        return _factory_over_twins(optimizer, twins)
    if isinstance(optimizer, Sequence) and all(isinstance(each, Optimizer) for each in optimizer):
        return [_over_twins(each, twins) for each in optimizer if isinstance(each, Optimizer)]
    if isinstance(optimizer, Sequence) and all(_is_pair(each) for each in optimizer):
        return [(select, _factory_over_twins(factory, twins)) for select, factory in optimizer]  # type: ignore[misc]
    return optimizer


def _factory_over_twins(factory: OptimizerFactory, twins: Mapping[int, nn.Parameter]) -> OptimizerFactory:
    """Return a factory for the twin, also where the user's looks at the model instead of at what it is given."""

    def make(parameters: Iterable[nn.Parameter]) -> Optimizer:
        made = factory(parameters)
        return _over_twins(made, twins) if isinstance(made, Optimizer) else made

    return make


def _over_twins(optimizer: Optimizer, twins: Mapping[int, nn.Parameter]) -> Optimizer:
    groups = [
        {key: value.clone() if isinstance(value, Tensor) else value for key, value in group.items()}
        | {"params": [twins.get(id(each), each) for each in group["params"]]}
        for group in optimizer.param_groups
    ]
    twin: Optimizer = object.__new__(type(optimizer))
    vars(twin).update({**vars(optimizer), "state": defaultdict(dict), "param_groups": groups})
    return twin


def kept_aside(optimizer: Optimizer) -> str | None:
    """Say where an optimizer keeps parameters besides its groups, which nobody else can exchange; None if it does not."""
    for name, value in vars(optimizer).items():
        if name in ("param_groups", "state", "defaults"):
            continue
        inside = (
            value.values()
            if isinstance(value, Mapping)
            else value
            if isinstance(value, (list, tuple, set))
            else [value]
        )
        if any(isinstance(each, nn.Parameter) for each in inside):
            return f"it keeps parameters in {name!r} besides its groups"
    return None


def fills_state(optimizer: Optimizer) -> bool:
    """Return whether this optimizer makes its state at construction instead of at its first step."""
    probe = nn.Parameter(torch.zeros(1))
    return bool(fresh_state(optimizer, probe, optimizer.defaults))


def _is_pair(each: object) -> bool:
    return isinstance(each, tuple) and len(each) == 2 and callable(each[1])


def _made(factory: OptimizerFactory, parameters: Mapping[str, nn.Parameter]) -> Optimizer:
    try:
        optimizer = factory(list(parameters.values()))
    except (TypeError, ValueError) as error:
        raise OptimizerError(f"the optimizer factory {shorten(factory)} failed: {error}. Write: {_EXAMPLE}") from error
    if not isinstance(optimizer, Optimizer):
        raise OptimizerError(
            f"the optimizer factory returned {shorten(optimizer)}, no torch Optimizer. Write: {_EXAMPLE}"
        )
    held = {id(each) for group in optimizer.param_groups for each in group["params"]}
    left = [name for name, each in parameters.items() if id(each) not in held]
    if left:
        raise OptimizerError(
            f"the factory's {type(optimizer).__name__} leaves out {len(left)} of {len(parameters)} parameters, first "
            f"{left[0]!r}. A factory is called once over every parameter and puts all of them into groups; freeze what "
            "is not to train: ledger.freeze(select, owner=...)"
        )
    return optimizer


def _partitioned(
    pairs: Sequence[tuple[Selector, OptimizerFactory]],
    parameters: Mapping[str, nn.Parameter],
    aliases: Mapping[str, str],
    layers: LayerMap,
) -> tuple[Optimizer, ...]:
    left = dict(parameters)
    optimizers: list[Optimizer] = []
    for select, factory in pairs:
        chosen = set(resolve(select, parameters, aliases, layers).names)
        taken = {name: each for name, each in left.items() if name in chosen}
        if not taken:
            raise OptimizerError(
                f"optimizer= gives {shorten(select)} nothing: earlier selectors took all that it matches."
            )
        left = {name: each for name, each in left.items() if name not in chosen}
        optimizers.append(_made(factory, taken))
    if left:
        raise OptimizerError(
            f"optimizer= leaves out {len(left)} of {len(parameters)} parameters, first {next(iter(left))!r}. "
            "Write: optimizer=[(select, factory), ('*', partial(torch.optim.AdamW, lr=1e-4))]"
        )
    return tuple(optimizers)


def _homes(
    optimizers: Sequence[Optimizer], parameters: Mapping[str, nn.Parameter], whole: Mapping[str, nn.Parameter]
) -> dict[str, Home]:
    names = {id(each): name for name, each in parameters.items()}
    homes: dict[str, Home] = {}
    every: list[Home] = []
    for place, optimizer in enumerate(optimizers):
        for number, group in enumerate(optimizer.param_groups):
            home = Home(place, len(every), group, _number(group.get("lr")))
            every.append(home)
            for index, each in enumerate(group["params"]):
                name = names.get(id(each))
                if name is None:
                    raise _unfit(optimizer, number, index, whole)
                if name in homes:
                    raise OptimizerError(f"{name!r} lies in two optimizer groups. Put every parameter into one group.")
                homes[name] = home
    if not homes:
        raise OptimizerError(f"the optimizer holds no parameter of the model. Write: {_EXAMPLE}")
    _adopt(homes, parameters)
    return homes


def _unfit(optimizer: Optimizer, number: int, index: int, parameters: Mapping[str, nn.Parameter]) -> OptimizerError:
    """Say which parameter an optimizer cannot bring into the fit: one that cannot train, or one of another model."""
    kind, group = type(optimizer).__name__, optimizer.param_groups[number]
    held = group["params"][index]
    name = next((name for name, each in parameters.items() if each is held), None)
    if name is not None:
        return OptimizerError(
            f"{kind} holds {name!r} of {held.dtype}, which cannot train. "
            f"Write: optimizer={kind}([p for p in model.parameters() if p.is_floating_point()], …)"
        )
    called = f", which it calls {group['param_names'][index]!r}," if "param_names" in group else ""
    alike = next((f"; {name!r} has that shape" for name, each in parameters.items() if each.shape == held.shape), "")
    return OptimizerError(
        f"{kind} holds a parameter{called} that is not in the model: params[{index}] of param_groups[{number}], of shape "
        f"{tuple(held.shape)}{alike}. Write: optimizer={kind}(model.parameters(), …) over the model you fit, as it is now"
    )


def _adopt(homes: dict[str, Home], parameters: Mapping[str, nn.Parameter]) -> None:
    """Give parameters that the user's optimizer left out the home of the nearest one of their kind.

    Biases and norm weights (one dimension or none) commonly have no weight decay, so kinds are kept apart.
    """
    order = list(parameters)
    known = [(index, name) for index, name in enumerate(order) if name in homes]
    for index, name in enumerate(order):
        if name in homes:
            continue
        flat = parameters[name].ndim <= 1
        kin = [(at, other) for at, other in known if (parameters[other].ndim <= 1) is flat] or known
        homes[name] = homes[min(kin, key=lambda pair: abs(pair[0] - index))[1]]


def _number(lr: object) -> float | None:
    return None if lr is None else float(lr.item() if isinstance(lr, Tensor) else lr)  # type: ignore[arg-type]
