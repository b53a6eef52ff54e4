"""LoRAInject: low-rank adapters train in place of the weights they stand beside."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias

import attrs
from torch import nn
from typing_extensions import override

from ..engine import (
    Algorithm,
    ArgumentError,
    Event,
    Json,
    ParameterLedger,
    Stage,
    State,
    SurgeryError,
    get_logger,
    register,
    warn,
)
from .arguments import check_in_range, check_one_of, check_selectors, check_whole, flag, in_range, one_of, positive
from .lora_forward import Rows
from .lora_modules import adapter_names, is_adapted
from .lora_op import CONVOLUTIONS, MAX_RANK, check_site, scaling_of
from .lora_targets import Target, by_pattern, check_target, lora_sites, lora_targets, modules_matching

TrainHead: TypeAlias = bool | Literal["auto"]
DEFAULT_RANK = 8
_PRETRAINED_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM")


def inject_lora(
    ledger: ParameterLedger,
    target: Target = "auto",
    *,
    rank: int | Mapping[str, int] = DEFAULT_RANK,
    alpha: float | Mapping[str, float] = 16,
    dropout: float = 0.0,
    lr: float | None = None,
    lr_ratio: float = 1.0,
    rslora: bool = False,
    train_head: TrainHead = "auto",
    modules_to_save: str | Sequence[str] = (),
    owner: str = "inject_lora",
) -> tuple[str, ...]:
    """Attach adapters to every target and hold the base weights.

    A target that carries an adapter of the same settings already, from an earlier fit, goes on training it.

    Args:
        ledger: The ledger of the model.
        target: What :func:`lora_targets` takes.
        rank: Rank of the adapters; or one for each glob, the first that matches.
        alpha: The adapter's output is multiplied by alpha / rank; or one for each glob.
        dropout: Probability with which an element of an adapter's input is dropped in training.
        lr: Base learning rate of the adapters; None is that of the weights they stand beside.
        lr_ratio: The rate of each B over that of its A.
        rslora: Multiply by alpha / sqrt(rank) instead.
        train_head: See :class:`LoRAInject`.
        modules_to_save: See :class:`LoRAInject`.
        owner: Who holds the base weights.

    Returns:
        Names of the adapters' parameters.

    Raises:
        SelectorError: ``target`` or ``modules_to_save`` matches nothing.
        SurgeryError: A target that takes no adapter. Nothing was attached then.
        ArgumentError: An argument of the wrong type or out of range.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> ledger = ParameterLedger(model, torch.optim.AdamW(model.parameters()))
        >>> inject_lora(ledger, rank=2, owner="me")
        ('0.lora_A', '0.lora_B')
        >>> sorted(ledger.trainable)
        ['0.lora_A', '0.lora_B', '2.bias', '2.weight']
        >>> inject_lora(ledger, rank=2, lr=0.1, lr_ratio=4, owner="me")  # it goes on
        ('0.lora_A', '0.lora_B')
        >>> sorted((name, group.base_lr, group.scale) for group in ledger.groups for name in group.parameters)
        [('0.lora_A', 0.1, 1.0), ('0.lora_B', 0.1, 4.0), ('2.bias', 0.001, 1.0), ('2.weight', 0.001, 1.0)]
        >>> inject_lora(model)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: inject_lora(ledger=) takes a ParameterLedger: ..., got 'Sequential'. Write: ...
        >>> for wrong in ({"rank": 1.5}, {"alpha": 0}, {"dropout": 1}, {"lr_ratio": 0}, {"train_head": "yes"}, {"target": 3}):
        ...     try:
        ...         inject_lora(ledger, **wrong)
        ...     except ArgumentError as error:
        ...         print(str(error).partition(" Write")[0])
        inject_lora(rank=) takes a whole number, 1 or above and 65536 or below, got 1.5.
        inject_lora(alpha=) takes a number above 0, got 0.
        inject_lora(dropout=) takes a number, 0 or above and below 1, got 1.
        inject_lora(lr_ratio=) takes a number above 0, got 0.
        inject_lora(train_head=) takes one of 'auto', True, False, got 'yes'.
        inject_lora(target=) takes 'auto', 'attention', 'all-linear', a glob over module names, a list of globs, or {glob: 'q,v'}, got 3.
    """
    if not isinstance(ledger, ParameterLedger):
        takes = "a ParameterLedger: state.ledger in a fit, else one over the model and its optimizer"
        example = "inject_lora(ParameterLedger(model, torch.optim.AdamW))"
        raise ArgumentError("inject_lora(ledger=)", got=type(ledger).__name__, takes=takes, example=example)
    _check_values("inject_lora(rank=)", rank, example="inject_lora(ledger, rank=8)", whole=True)
    _check_values("inject_lora(alpha=)", alpha, example="inject_lora(ledger, alpha=16)", whole=False)
    check_in_range("inject_lora(dropout=)", dropout, at_least=0, below=1, example="inject_lora(ledger, dropout=0.05)")
    check_in_range("inject_lora(lr_ratio=)", lr_ratio, above=0, example="inject_lora(ledger, lr_ratio=16)")
    check_one_of(
        "inject_lora(train_head=)", train_head, ("auto", True, False), example="inject_lora(ledger, train_head=True)"
    )
    check_target("inject_lora(target=)", target, "inject_lora(ledger, 'all-linear')")
    model = ledger.model
    plans = _plans(ledger, target, rank, alpha, dropout=dropout, rslora=rslora)
    whole = _whole(ledger, modules_to_save, train_head, list(plans))
    fresh = {name: plan for name, plan in plans.items() if not _goes_on(model, name, plan)}
    adapted = _adapters(model)
    base = [name for name in ledger.parameters if name not in adapted]
    if rank != DEFAULT_RANK:
        _warn_of_rank(model, fresh)
    with ledger.at_once():
        _attach(ledger, fresh, owner)
        for name in whole.modules:
            if not getattr(model.get_submodule(name), "lora_saved", False):
                ledger.attach(name, "lora_saved", owner=owner)
        if held := [name for name in base if name not in whole.parameters]:
            ledger.freeze(held, owner=owner)
        mine = _adapters(model, plans)
        adapters = tuple(name for name in ledger.parameters if name in mine)
        if lr is not None:
            ledger.set_lr(adapters, lr, owner=owner)
        if lr_ratio != 1.0:
            ups = [name for name in adapters if name.rpartition(".")[2].startswith("lora_B")]
            ledger.scale(ups, lr_ratio, owner=owner)
    get_logger(__name__).info("injected", targets=len(plans), fresh=len(fresh), rank=rank, held=len(held))
    return adapters


def _warn_of_rank(model: nn.Module, plans: Mapping[str, _Plan]) -> None:
    """Warn where a rank that somebody chose is above what a change of the weight can have.

    Example:
        >>> import warnings
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     for rank in (4, 5):
        ...         _warn_of_rank(model, {"0": _Plan(rank, 16, 0.0, False, None)})
        >>> [str(each.message) for each in caught]
        ["an adapter of rank 5 at '0', which is 4 x 8, is larger than the weight itself: ... Write LoRAInject(rank=1)."]
    """
    for name, plan in plans.items():
        weight = getattr(model.get_submodule(name), "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 2 and plan.rank > min(weight.shape):
            shape = " x ".join(map(str, weight.shape))
            warn(
                f"an adapter of rank {plan.rank} at {name!r}, which is {shape}, is larger than the weight itself: no change "
                f"of it has a rank above {min(weight.shape)}. Write LoRAInject(rank={max(1, min(weight.shape) // 4)})."
            )
            return


def _check_field(_instance: object, _attribute: attrs.Attribute[Any], value: object) -> None:
    check_target("LoRAInject(target=)", value, "LoRAInject(target='all-linear')")


def _check_rank(_instance: object, _attribute: attrs.Attribute[Any], value: object) -> None:
    _check_values("LoRAInject(rank=)", value, example="LoRAInject(rank=8)", whole=True)


def _check_alpha(_instance: object, _attribute: attrs.Attribute[Any], value: object) -> None:
    _check_values("LoRAInject(alpha=)", value, example="LoRAInject(alpha=16)", whole=False)


def _modules_to_save(value: str | Sequence[str]) -> tuple[str, ...]:
    example = "LoRAInject(modules_to_save=['classifier'])"
    return check_selectors("LoRAInject(modules_to_save=)", value, example=example, empty=True)


@register
@attrs.define(slots=False, eq=False)
class LoRAInject(Algorithm):
    """Train low-rank adapters in place of the weights.

    At the start of a fit, adapters are attached to the targets, the model's output unchanged, and all base weights are
    held. What LayerThaw and others release or hold adds to this: what trains in a thawed block is its adapters.

    Args:
        rank: Rank of the adapters; or one for each glob over the targets' names or their ends, the first that matches:
            ``{"*.query": 16, "*": 8}``.
        alpha: The adapter's output is multiplied by alpha / rank; or one for each glob.
        target: ``"auto"``, ``"attention"``, ``"all-linear"``, a glob over module names or their ends, a list of
            globs, or slices of a fused projection, ``{"c_attn": "q,v"}``; see :func:`lora_targets`.
        dropout: Probability with which an element of an adapter's input is dropped in training.
        lr: Base learning rate of the adapters; None is that of the weights they stand beside.
        train_head: Whether the model's head (``layers.head``) trains as a whole. ``"auto"``: yes, as a new classifier
            must, except in language models, whose head is pre-trained: the class is called …ForCausalLM, …LMHeadModel,
            …ForConditionalGeneration or …ForMaskedLM. Where ``target`` names a part of it, that part trains by its adapter.
        rslora: Multiply by alpha / sqrt(rank) instead, so that high ranks learn as fast as low ones.
        lr_ratio: The learning rate of each ``lora_B`` over that of its ``lora_A`` (LoRA+).
        modules_to_save: Globs over module names or their ends; these modules train as a whole beside the adapters and are
            saved with them, as is a head that trains.

    Raises:
        ArgumentError: An argument of the wrong type or out of range.

    Source:
        Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685; rslora: Kalajdzievski,
        arXiv:2312.03732; lr_ratio: Hayou, Ghosh, Yu, LoRA+, arXiv:2402.12354.

    Example:
        >>> import torch
        >>> from thawline.engine import Trainer
        >>> from thawline.engine.testing import tiny_loader
        >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.rand(3, 4)
        >>> trainer = Trainer(loss_fn=nn.functional.cross_entropy, algorithms=[LoRAInject(rank=2, alpha=6)])
        >>> result = trainer.fit(model, tiny_loader(), duration="2ep")
        >>> adapted = model[0]
        >>> weight = adapted.weight + 6 / 2 * adapted.lora_B @ adapted.lora_A
        >>> torch.allclose(adapted(x), nn.functional.linear(x, weight, adapted.bias), atol=1e-6)
        True
        >>> LoRAInject(rank=0)
        Traceback (most recent call last):
        thawline.engine.errors.ArgumentError: LoRAInject(rank=) takes a whole number, 1 or above and 65536 or below, got 0. Write: LoRAInject(rank=8)
    """

    events = frozenset({Event.FIT_START})
    stage: ClassVar[Stage] = Stage.SURGERY

    rank: int | Mapping[str, int] = attrs.field(default=DEFAULT_RANK, validator=_check_rank)
    alpha: float | Mapping[str, float] = attrs.field(default=16, validator=_check_alpha)
    target: Target = attrs.field(default="auto", validator=_check_field)
    dropout: float = attrs.field(default=0.0, validator=in_range(at_least=0, below=1))
    lr: float | None = attrs.field(default=None, validator=positive(or_none=True, example=1e-3))
    train_head: TrainHead = attrs.field(default="auto", validator=one_of(("auto", True, False)))
    rslora: bool = attrs.field(default=False, validator=flag())
    lr_ratio: float = attrs.field(default=1.0, validator=positive(example=16))
    modules_to_save: tuple[str, ...] = attrs.field(default=(), converter=_modules_to_save)

    @override
    def apply(self, event: Event, state: State) -> None:
        """Attach, hold and set the rate."""
        inject_lora(
            state.ledger, self.target, rank=self.rank, alpha=self.alpha, dropout=self.dropout, lr=self.lr,
            lr_ratio=self.lr_ratio, rslora=self.rslora, train_head=self.train_head, modules_to_save=self.modules_to_save,
            owner=self.owner,
        )  # fmt: skip


@attrs.frozen
class _Plan:
    """The settings of one module's adapter.

    Example:
        >>> _Plan(4, 16, 0.1, False, None).scaling, _Plan(4, 16, 0.1, True, None).scaling
        (4.0, 8.0)
        >>> _Plan(4, 16, 0.1, False, None).arguments, _Plan(4, 16, 0.1, True, ((0, 2),)).arguments
        ({'rank': 4, 'alpha': 16, 'dropout': 0.1}, {'rank': 4, 'alpha': 16, 'dropout': 0.1, 'rslora': True, 'rows': [[0, 2]]})
    """

    rank: int
    alpha: float
    dropout: float
    rslora: bool
    rows: Rows | None

    @property
    def scaling(self) -> float:
        return scaling_of(self.rank, self.alpha, rslora=self.rslora)

    @property
    def arguments(self) -> dict[str, Json]:
        """What the op takes; defaults are left out."""
        given: dict[str, Json] = {"rank": self.rank, "alpha": self.alpha, "dropout": self.dropout}
        if self.rslora:
            given["rslora"] = True
        if self.rows is not None:
            given["rows"] = [list(each) for each in self.rows]
        return given


@attrs.frozen
class _Whole:
    """What trains as a whole: modules to mark, and parameters not to hold."""

    modules: tuple[str, ...]
    parameters: frozenset[str]


def _plans(
    ledger: ParameterLedger, target: Target, rank: int | Mapping[str, int], alpha: float | Mapping[str, float], *,
    dropout: float, rslora: bool,
) -> dict[str, _Plan]:  # fmt: skip
    sites = lora_sites(ledger.model, ledger.layers, target)
    ranks = by_pattern("LoRAInject(rank=)", rank, sites, "LoRAInject(rank={'*.query': 16, '*': 8})")
    alphas = by_pattern("LoRAInject(alpha=)", alpha, sites, "LoRAInject(alpha={'*.query': 32, '*': 16})")
    return {name: _Plan(ranks[name], alphas[name], dropout, rslora, rows) for name, rows in sites.items()}


def _whole(
    ledger: ParameterLedger, modules_to_save: str | Sequence[str], train_head: TrainHead, targets: Sequence[str]
) -> _Whole:
    """Find what trains as a whole beside the adapters: what was asked for, and the head.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        >>> ledger = ParameterLedger(model, torch.optim.SGD)
        >>> whole = _whole(ledger, "1", "auto", ["0"])
        >>> whole.modules, sorted(whole.parameters)
        (('1', '2'), ['1.bias', '1.weight', '2.bias', '2.weight'])
        >>> _whole(ledger, (), False, ["0"]).modules, _whole(ledger, (), "auto", ["2"]).modules
        ((), ())
        >>> _whole(ledger, (), True, ["2"])
        Traceback (most recent call last):
        thawline.engine.errors.SurgeryError: LoRAInject(train_head=True) trains the head as a whole, and '2' in it gets an adapter. ...
        >>> _whole(ledger, "0", False, ["0"])
        Traceback (most recent call last):
        thawline.engine.errors.SurgeryError: LoRAInject(modules_to_save=) got '0', in which '0' gets an adapter: ...
    """
    model, argument = ledger.model, "LoRAInject(modules_to_save=)"
    patterns = (modules_to_save,) if isinstance(modules_to_save, str) else tuple(modules_to_save)
    modules = modules_matching(model, patterns, argument)
    for name in modules:
        if inside := next((each for each in targets if f"{each}.".startswith(f"{name}.")), None):
            got = f"{name!r}, in which {inside!r} gets an adapter"
            raise SurgeryError(
                f"{argument} got {got}: a module trains either as a whole or by an adapter. Leave one out."
            )
    parameters = {
        id(each)
        for name in modules
        for part, each in model.get_submodule(name).named_parameters()
        if "lora_" not in part
    }
    if (not _has_pretrained_head(model)) if train_head == "auto" else train_head:
        head = {id(ledger.parameters[name]) for name in ledger.layers.head.parameters if name in ledger.parameters}
        within = {name: {id(each) for each in model.get_submodule(name).parameters()} & head for name in targets}
        if train_head is True and (inside := next((name for name, parts in within.items() if parts), None)):
            raise SurgeryError(
                f"LoRAInject(train_head=True) trains the head as a whole, and {inside!r} in it gets an adapter. Leave it out of "
                "target=, or write train_head=False."
            )
        head = head.difference(*within.values())
        parameters |= head
        modules = (*modules, *(name for name in _owning(model, head, targets) if name not in modules))
    return _Whole(modules, frozenset(name for name, each in ledger.parameters.items() if id(each) in parameters))


def _owning(model: nn.Module, parameters: set[int], targets: Sequence[str]) -> list[str]:
    """Return the outermost modules all of whose parameters are among ``parameters``, but for what gets adapters.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))
        >>> every = {id(each) for each in model[1].parameters()}
        >>> _owning(model, every, []), _owning(model, every, ["1.0"]), _owning(model, every - {id(model[1][0].weight)}, [])
        (['1'], ['1.2'], ['1.2'])
    """
    found: list[str] = []
    parts = [each.split(".") for each in targets]
    adapting = {".".join(each[:count]) for each in parts for count in range(1, len(each) + 1)}
    for name, module in model.named_modules():
        mine = [id(each) for each in module.parameters()]
        if not name or not mine or any(name.startswith(f"{other}.") for other in found):
            continue
        if parameters.issuperset(mine) and name not in adapting and not any(map(is_adapted, module.modules())):
            found.append(name)
    return found


def _attach(ledger: ParameterLedger, plans: Mapping[str, _Plan], owner: str) -> None:
    """Attach adapters, those of equal settings together; none stays where one is refused.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU())
        >>> ledger, plan = ParameterLedger(model, torch.optim.SGD), _Plan(2, 16, 0.0, False, None)
        >>> _attach(ledger, {"0": plan, "1": attrs.evolve(plan, rank=3), "2": plan}, "me")
        >>> [tuple(each.lora_A.shape) for each in model[:3]], [entry.module for entry in ledger.journal]
        ([(2, 4), (3, 4), (2, 4)], ['0', '2', '1'])
    """
    alike: dict[str, tuple[dict[str, Json], list[str]]] = {}
    for name, plan in plans.items():
        check_site(ledger.model, name, ledger.model.get_submodule(name), rank=plan.rank, rows=plan.rows)
        alike.setdefault(repr(plan), (plan.arguments, []))[1].append(name)
    for arguments, names in alike.values():
        ledger.attach(names, "lora", owner=owner, **arguments)


def _goes_on(model: nn.Module, name: str, plan: _Plan) -> bool:
    """Return whether the module carries this adapter already; raise where it carries or can take no such one.

    Example:
        >>> import torch
        >>> from thawline.algorithms import merge_lora
        >>> model, plan = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.Linear(4, 2)), _Plan(2, 16, 0.0, False, None)
        >>> adapters = inject_lora(ParameterLedger(model, torch.optim.SGD), ["0", "1"], rank=2)
        >>> _goes_on(model, "0", plan), _goes_on(model, "1", plan), _goes_on(model, "2", plan)
        (True, True, False)
        >>> for other in ({"rank": 1}, {"alpha": 8}, {"dropout": 0.1}, {"rows": [[0, 2]]}):
        ...     try:
        ...         _goes_on(model, "0", attrs.evolve(plan, **other))
        ...     except SurgeryError as error:
        ...         print(error)
        '0' carries an adapter of rank 2 already, alpha / rank 8, dropout 0. Write ...
        '0' carries an adapter of rank 2 already, alpha / rank 8, dropout 0. Write ...
        '0' carries an adapter of rank 2 already, alpha / rank 8, dropout 0. Write ...
        '0' carries an adapter of rank 2 already, alpha / rank 8, dropout 0. Write ...
        >>> merge_lora(model), _goes_on(model, "0", plan)
        Traceback (most recent call last):
        thawline.engine.errors.SurgeryError: the adapter of '0' is merged and cannot train. Write unmerge_lora(model) first.
    """
    module: Any = model.get_submodule(name)
    if not is_adapted(module):
        check_site(model, name, module, rank=plan.rank, rows=plan.rows)
        return False
    if module.lora_merged:
        raise SurgeryError(f"the adapter of {name!r} is merged and cannot train. Write unmerge_lora(model) first.")
    across = 0 if isinstance(model.get_submodule(name), CONVOLUTIONS) else 1
    part = "lora_A" if across == 0 else "lora_B"
    ranks = {module.get_parameter(each).shape[across] for each in adapter_names(module) if each.startswith(part)}
    alike = math.isclose(module.lora_scaling, plan.scaling, rel_tol=1e-9) and module.lora_dropout == plan.dropout
    if ranks == {plan.rank} and alike and _listed(getattr(module, "lora_rows", None)) == _listed(plan.rows):
        return True
    raise SurgeryError(
        f"{name!r} carries an adapter of rank {min(ranks)} already, alpha / rank {module.lora_scaling:g}, dropout "
        f"{module.lora_dropout:g}. Write the same values to go on training it, or choose other targets."
    )


def _listed(rows: Rows | None) -> list[list[int]] | None:
    return None if rows is None else [list(each) for each in rows]


def _adapters(model: nn.Module, names: Iterable[str] = ("",)) -> frozenset[str]:
    """Return the names of the adapters' parameters in the modules called ``names`` and below.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 2))
        >>> adapters = inject_lora(ParameterLedger(model, torch.optim.SGD), rank=2)
        >>> sorted(_adapters(model)) == sorted(adapters), sorted(_adapters(model, ["1", "2"])), sorted(_adapters(model[0]))
        (True, ['1.0.lora_A', '1.0.lora_B'], ['lora_A', 'lora_B'])
    """
    found: set[str] = set()
    for start in names:
        for inner, module in model.get_submodule(start).named_modules(prefix=start):
            if is_adapted(module):
                found.update(f"{inner}.{name}" if inner else name for name in adapter_names(module))
    return frozenset(found)


def _has_pretrained_head(model: nn.Module) -> bool:
    """Return whether a model is a language model, by its class's name or that of one it is derived from.

    Example:
        >>> class TinyForCausalLM(nn.Module): ...
        >>> class Chat(TinyForCausalLM): ...
        >>> _has_pretrained_head(Chat()), _has_pretrained_head(nn.Linear(2, 2))
        (True, False)
    """
    return any(each.__name__.endswith(_PRETRAINED_HEADS) for each in type(model).__mro__)


def _check_values(argument: str, value: object, *, example: str, whole: bool) -> None:
    """Check one value or a mapping from globs to values.

    Example:
        >>> _check_values("rank=", {"*.query": 1, "*": 65536}, example="8", whole=True)
        >>> _check_values("alpha=", 0.5, example="8", whole=False)
        >>> for wrong in (65537, 0.5, {}, {"": 8}, {3: 8}, {"*": 0}):
        ...     try:
        ...         _check_values("rank=", wrong, example="8", whole=True)
        ...     except ArgumentError as error:
        ...         print(str(error).partition(" Write")[0])
        rank= takes a whole number, 1 or above and 65536 or below, got 65537.
        rank= takes a whole number, 1 or above and 65536 or below, got 0.5.
        rank= takes a number or {glob: number}, got {}.
        rank= takes a number or {glob: number}, got {'': 8}.
        rank= takes a number or {glob: number}, got {3: 8}.
        rank= takes a whole number, 1 or above and 65536 or below, got 0.
    """
    if isinstance(value, Mapping) and (not value or not all(isinstance(each, str) and each for each in value)):
        raise ArgumentError(argument, got=value, takes="a number or {glob: number}", example=example)
    for each in value.values() if isinstance(value, Mapping) else [value]:
        if whole:
            check_whole(argument, each, at_least=1, at_most=MAX_RANK, example=example)
        else:
            check_in_range(argument, each, above=0, example=example)


__all__ = ["LoRAInject", "inject_lora", "lora_targets"]
