"""Keyword arguments that a call does not take: what to write instead."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from difflib import get_close_matches
from functools import wraps
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar, cast

from .errors import CallError, UnknownArgumentError, shorten

P = ParamSpec("P")
R = TypeVar("R")
Kind = TypeVar("Kind", bound=type)

_OPEN = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_MOST_LISTED = 10
"""Arguments that are listed also where one of them is near."""


def _table(*rows: tuple[str, str]) -> dict[str, str]:
    return {name: write for names, write in rows for name in names.split()}


_FIT = "trainer.fit(model, train_loader, duration='3ep'"
INSTEAD = _table(
    ("lr learning_rate base_lr max_lr", "Trainer(optimizer=partial(torch.optim.AdamW, lr={}))"),
    ("weight_decay wd", "Trainer(optimizer=partial(torch.optim.AdamW, lr=1e-4, weight_decay={}))"),
    ("betas", "Trainer(optimizer=partial(torch.optim.AdamW, lr=1e-4, betas={}))"),
    ("momentum", "Trainer(optimizer=partial(torch.optim.SGD, lr=0.1, momentum={}))"),
    ("optim optimizers optimizer_class", "Trainer(optimizer=partial(torch.optim.AdamW, lr=1e-4))"),
    ("epochs max_epochs num_epochs n_epochs nb_epochs num_train_epochs epoch", "trainer.fit(model, train_loader, duration='{}ep')"),
    ("steps max_steps num_steps num_train_steps max_train_steps max_iters iterations batches",
     "trainer.fit(model, train_loader, duration='{}ba')"),
    ("max_duration", _FIT + ")"),
    ("scheduler schedulers lr_scheduler lr_schedulers lr_schedule lr_scheduler_type", "Trainer(schedule=cosine())"),
    ("warmup warmup_steps num_warmup_steps", "Trainer(schedule=warmup('{}ba', then=cosine()))"),
    ("warmup_epochs", "Trainer(schedule=warmup('{}ep', then=cosine()))"),
    ("warmup_ratio", "Trainer(schedule=warmup('{}dur', then=cosine()))"),
    ("loss criterion loss_function loss_func compute_loss", "Trainer(loss_fn=torch.nn.functional.cross_entropy)"),
    ("callbacks callback plugins", "Trainer(algorithms=[…])"),
    ("max_grad_norm gradient_clip_val grad_clip clip_grad_norm", "Trainer(algorithms=[GradClip({})])"),
    ("patience early_stopping_patience", "Trainer(algorithms=[EarlyStop('eval/loss', patience={})])"),
    ("accumulation gradient_accumulation gradient_accumulation_steps accumulation_steps accumulate_grad_batches grad_accum",
     "Trainer(accumulate={})"),
    ("batch_size per_device_train_batch_size", "trainer.fit(model, DataLoader(dataset, batch_size={}), duration='3ep')"),
    ("bf16 amp mixed_precision", "Trainer(precision='bf16')"),
    ("fp16 half", "Trainer(precision='fp16')"),
    ("logger loggers report_to", "Trainer(trackers=[CometTracker('my-project')])"),
    ("output_dir save_dir save_folder default_root_dir log_dir logging_dir", "Trainer(run_dir={})"),
    ("save_every save_interval save_steps save_strategy", "Trainer(run_dir='runs/first', checkpoint=Checkpointing(every='1ep'))"),
    ("val_loader valid_loader val_dataloader val_dataloaders eval_dataloader test_loader validation_data eval_dataset eval_data",
     "trainer.fit(model, train_loader, eval_loader, duration='3ep')"),
    ("train_dataloader train_dataloaders train_dataset train_data dataloader loader data", _FIT + ")"),
    ("ckpt_path resume_from resume_from_checkpoint load_path", _FIT + ", resume={})"),
    ("accelerator gpus devices", "Trainer(device='auto')"),
    ("verbose enable_progress_bar disable_tqdm progress_bar", "Trainer(progress=False)"),
    ("random_state random_seed", "Trainer(seed={})"),
)  # fmt: skip
"""Names that other trainers give to what is written otherwise here."""


LEDGER = {
    "freeze": "'head', owner='me'", "thaw": "'head', owner='me'", "scale": "'head', 0.1, owner='me'",
    "set_lr": "'head', 1e-3, owner='me'", "set_options": "'head', owner='me', weight_decay=0.0",
    "drop_moments": "'head', owner='me'", "attach": "name, 'lora', owner='me', rank=8, alpha=16",
    "detach": "name, 'lora', owner='me'",
}  # fmt: skip
"""A correct call of each method of the ledger that changes something."""


def refuse_unknown(
    call: str, given: Mapping[str, object], takes: Collection[str], instead: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Raise where a call is given a keyword that it does not take.

    Args:
        call: The call as it is written, such as ``"trainer.fit"``.
        given: Its keyword arguments.
        takes: The names that it takes.
        instead: By a name that it does not take, what to write; ``{}`` stands for the value.

    Raises:
        UnknownArgumentError: There is one; it names what to write instead, or the nearest argument.

    Example:
        >>> refuse_unknown("LayerThaw", {"evry": 3}, ["every", "start"])
        Traceback (most recent call last):
        thawline.engine.errors.UnknownArgumentError: LayerThaw takes no 'evry', only every, start; got 3. Write: LayerThaw(every=3)
    """
    unknown = next((name for name in given if name not in takes), None)
    if unknown is None:
        return
    write = instead.get(unknown) or _nearest(call, unknown, takes, instead)
    listed = takes if write is None or len(takes) <= _MOST_LISTED else ()
    example = f"help({call})" if write is None else write.replace("{}", _written(given[unknown], write))
    raise UnknownArgumentError(call, unknown, got=given[unknown], takes=listed, example=example)


def _nearest(call: str, name: str, takes: Collection[str], instead: Mapping[str, str]) -> str | None:
    if close := get_close_matches(name, takes, n=1):
        return f"{call}({close[0]}={{}})"
    return instead[close[0]] if (close := get_close_matches(name, instead, n=1)) else None


def refuse_misplaced(
    call: str, signature: inspect.Signature, given: tuple[object, ...], keywords: Collection[str], example: str
) -> None:
    """Raise where a call leaves out an argument that it needs, or has more without a keyword than it takes so.

    Args:
        call: The call as it is written, such as ``"trainer.fit"``.
        signature: Its signature.
        given: What it is given without a keyword.
        keywords: The keywords that it is given; all of them are known.
        example: A correct call.

    Raises:
        CallError: There is one.

    Example:
        >>> signature = inspect.signature(lambda model, *, duration: None)
        >>> refuse_misplaced("fit", signature, ("model",), (), "fit(model, duration='3ep')")
        Traceback (most recent call last):
        thawline.engine.errors.CallError: fit(duration=) is missing. Write: fit(model, duration='3ep')
    """
    parameters = signature.parameters.values()
    placed = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    if len(given) > len(placed) and not any(each.kind is each.VAR_POSITIONAL for each in parameters):
        takes = f"takes keywords after {placed[-1]}" if placed else "takes keywords only"
        raise CallError(call, f"{takes}, got {shorten(given[len(placed)])} without one", example=example)
    there = {*placed[: len(given)], *keywords}
    for each in parameters:
        if each.default is each.empty and each.name not in there and each.kind not in _OPEN:
            raise CallError(f"{call}({each.name}=)", "is missing", example=example)


def explained(
    call: str, example: str, instead: Mapping[str, str] = INSTEAD, *, method: bool = True
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a method or function say what to write instead of a call that it does not take; its signature stays.

    Args:
        call: The call as it is written.
        example: A correct one.
        instead: As for :func:`refuse_unknown`.
        method: Whether its first argument is the object.
    """

    def explain(function: Callable[P, R]) -> Callable[P, R]:
        parameters = [*inspect.signature(function).parameters.values()][method:]
        signature = inspect.Signature(parameters)
        takes = [each.name for each in parameters if each.kind not in _OPEN]
        anything = any(each.kind is each.VAR_KEYWORD for each in parameters)

        @wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            if not anything:
                refuse_unknown(call, kwargs, takes, instead)
            refuse_misplaced(call, signature, args[method:], kwargs, example)
            return function(*args, **kwargs)

        return checked

    return explain


def explained_methods(call: str, examples: Mapping[str, str]) -> Callable[[Kind], Kind]:
    """Let methods of a class say what to write instead of a call that they do not take; their signatures stay.

    Args:
        call: What the object is called.
        examples: The arguments of a correct call, by method.
    """

    def explain(kind: Kind) -> Kind:
        for name, arguments in examples.items():
            whole = f"{call}.{name}"
            type.__setattr__(kind, name, explained(whole, f"{whole}({arguments})", {})(getattr(kind, name)))
        return kind

    return explain


def explained_constructor(call: str, example: str, instead: Mapping[str, str] = INSTEAD) -> Callable[[Kind], Kind]:
    """Let a class say what to write instead of a call that its constructor does not take; its signature stays."""

    def explain(kind: Kind) -> Kind:
        cast("Any", kind).__init__ = explained(call, example, instead)(cast("Any", kind).__init__)
        return kind

    return explain


def elsewhere(call: str, names: Iterable[str]) -> dict[str, str]:
    """Return what to write for arguments that another call takes.

    Args:
        call: The other call, open at its end: ``"Trainer("``.
        names: Its arguments.
    """
    return {name: f"{call}{name}={{}})" for name in names}


def _written(value: object, write: str) -> str:
    """Return a value as it stands in what to write: in a time the number alone, for objects a gap."""
    if "'{}" in write:
        return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else "3"
    return shorten(value) if isinstance(value, (int, float, str, list, tuple, type(None))) else "…"
