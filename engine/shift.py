"""Whether a model shifts its labels: what the loss that it computes itself is a mean over."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Literal

from torch import nn

# How a forward comes to its loss: it leaves the first label out, takes every label, asks transformers' loss function,
# or computes none, so that a model inside does.
_Kind = Literal["shifted", "aligned", "asks", "none"]


def shifts_labels(model: nn.Module) -> bool:
    """Return whether the loss that ``model`` computes from ``labels`` leaves out the first label of each row.

    Causal language models predict the next token, and most of those of transformers shift the labels themselves.
    Neither their class names nor their ``loss_type`` say which: ``GPT2LMHeadModel`` has none and shifts,
    ``BartForCausalLM`` is of type ``"ForCausalLM"`` and does not. What decides is their code: a slice ``labels[..., 1:]``,
    or a call of ``self.loss_function`` where that is ``ForCausalLMLoss``. A model that hands its labels on, such as an
    adapter's wrapper, is as the first one inside that computes a loss.

    Example:
        >>> class NextToken(nn.Module):
        ...     def forward(self, ids, labels):
        ...         logits = nn.functional.one_hot(ids).float()
        ...         return nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])
        >>> shifts_labels(NextToken()), shifts_labels(nn.Linear(1, 1))
        (True, False)
    """
    for module in model.modules():
        kind = _kind(type(module).forward)
        if kind == "asks":
            return getattr(getattr(module, "loss_function", None), "__name__", "") == "ForCausalLMLoss"
        if kind != "none":
            return kind == "shifted"
    return False


@lru_cache(maxsize=1024)
def _kind(forward: Callable[..., Any]) -> _Kind:
    forward = inspect.unwrap(forward)
    if str(getattr(forward, "__module__", "torch.")).startswith("torch."):
        return "none"
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):  # a class made in a console, or a forward that is no function
        return "none"
    nodes = list(ast.walk(tree))
    if any(isinstance(each, ast.Subscript) and _leaves_out_first(each) for each in nodes):
        return "shifted"
    asked = [each for each in _calls(nodes) if _name(each.func) == "loss_function"]
    if asked:
        # Where the decoder's inputs were shifted already, the labels are given under this name and taken as they are.
        aligned = any(keyword.arg == "shift_labels" for each in asked for keyword in each.keywords)
        return "aligned" if aligned else "asks"
    return "aligned" if any(_is_loss(_name(each.func)) for each in _calls(nodes)) else "none"


def _leaves_out_first(node: ast.Subscript) -> bool:
    slices = (each for each in ast.walk(node.slice) if isinstance(each, ast.Slice))
    return "label" in _name(node.value) and any(
        isinstance(each.lower, ast.Constant) and each.lower.value == 1 and each.upper is None for each in slices
    )


def _calls(nodes: list[ast.AST]) -> Iterator[ast.Call]:
    return (each for each in nodes if isinstance(each, ast.Call))


def _is_loss(name: str) -> bool:
    return any(word in name.lower() for word in ("loss", "criterion", "cross_entropy", "crossentropy"))


def _name(node: Any) -> str:
    return getattr(node, "id", "") or getattr(node, "attr", "")
