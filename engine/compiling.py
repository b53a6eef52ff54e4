"""Compiling block by block: what thaws or freezes then costs a graph of a block, not one of the model."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .errors import ArgumentError, RecompileError
from .layers import LayerMap
from .ledger import at_rest
from .log import get_logger

log = get_logger(__name__)


BACKEND = "inductor"
"""What compiles, as torch calls it."""
GRAPHS = 5
"""How many graphs a block structure has at most: it trains or not, its input has a gradient or not, and evaluation."""


class CompiledBlocks:
    """A context in which each block of a model is compiled by itself, in place: its names and its identity stay.

    Blocks of one structure share their graphs, and sizes of batches and sequences are symbols in them, so a structure
    has at most :data:`GRAPHS`, whatever trains when. A structure is the classes of a block's modules and the shapes of
    its parameters; the numbers in its attributes as the fit begins, such as a rate of dropout; where a part of a block is held, which part it is; where modules in it differ in mode, which do, and whether it
    stands in eval mode in a step of training; and how its input lies in memory, which of its sizes are 1, and beside
    convolutions whether they are 16 samples or more. So a block with adapters is another structure than one without. Within the context the number
    of recompilations is limited by that alone, and where torch would fall back to eager there is an error.

    Args:
        model: The model.
        layers: Its layers; what lies in blocks is compiled.
        backend: Instead of :data:`BACKEND`.

    Raises:
        ArgumentError: The model has no blocks.
        RecompileError: On leaving: a block could not be compiled as one graph, or has more graphs than it may.

    Example:
        One graph for the first block, whose input has no gradient, and one for those behind it.

        >>> model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])
        >>> with CompiledBlocks(model, LayerMap(model), backend="aot_eager") as blocks:
        ...     _ = model(torch.ones(2, 4))
        >>> [len(each) for each in blocks.graphs.values()], list(model.state_dict()) == [f"{i}.{name}" for i in range(4) for name in ("weight", "bias")]
        ([2], True)
    """

    def __init__(self, model: nn.Module, layers: LayerMap, *, backend: str | None = None) -> None:
        self.modules = compiled_modules(model, layers)
        if not self.modules:
            raise ArgumentError(
                "Trainer(compile=)", got="blocks", takes=f"a model with blocks, which {type(model).__name__} has not",
                example="trainer.fit(model, …, layers={'stem': …, 'blocks': 'layers.*', 'head': …})",
            )  # fmt: skip
        self._backend = backend or BACKEND
        self.graphs: dict[Hashable, set[str]] = {}
        """The graphs of each block structure, as torch calls them."""
        self._called: tuple[nn.Module, tuple[Any, ...]] | None = None

    def __enter__(self) -> Self:
        import torch._dynamo.config as dynamo  # a second: only where something is compiled
        import torch.fx.experimental._config as symbols
        from torch._guards import CompileContext

        numbers = {each: _numbers(each) for each in self.modules}
        compile_with: Any = torch._dynamo.lookup_backend(self._backend)

        def backend(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
            assert self._called is not None, "only blocks are compiled"
            graphs = self.graphs.setdefault((structure(*self._called), numbers[self._called[0]]), set())
            graphs.add(str(CompileContext.current_compile_id()))  # the same where torch begins anew
            if len(graphs) > GRAPHS:
                raise RecompileError(
                    f"more than {GRAPHS} graphs of a {type(self._called[0]).__name__}: something in it changes from call to "
                    "call besides what trains, such as a number in an attribute. Write Trainer(compile=False), or set "
                    "TORCH_LOGS=recompiles in the environment to see what it is."
                )
            compiled: Callable[..., Any] = compile_with(graph, inputs)
            return compiled

        self._settings = ExitStack()
        unlimited = sys.maxsize
        self._settings.enter_context(
            dynamo.patch(
                recompile_limit=unlimited, accumulated_recompile_limit=unlimited, fail_on_recompile_limit_hit=True
            )
        )
        # torch looks at the gradient of what goes into a block, and warns of it before it hides the warning.
        self._settings.enter_context(warnings.catch_warnings())
        warnings.filterwarnings(
            "ignore", message="The .grad attribute of a Tensor that is not a leaf", category=UserWarning
        )
        # A batch that is by chance as large as the model is wide is not always so.
        self._settings.enter_context(symbols.patch(use_duck_shape=False))  # type: ignore[attr-defined]  # torch adds it
        call = torch.compile(_through, backend=backend, fullgraph=True, dynamic=True)
        self._before = [each._compiled_call_impl for each in self.modules]
        for each in self.modules:
            each._compiled_call_impl = partial(self._call, call, each)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for each, before in zip(self.modules, self._before, strict=True):
            each._compiled_call_impl = before
        log.info("compiled", graphs=[len(each) for each in self.graphs.values()])
        self.modules = []  # torch keeps the graphs, and with them the backend
        self._settings.close()
        if error is not None and (reason := _reason(error)) is not None:
            raise reason from error

    def _call(self, compiled: Callable[..., Any], block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call a compiled block, so that it has one graph where no gradients are recorded, whatever trains."""
        self._called = block, (*args, *kwargs.values())
        try:
            if torch.is_grad_enabled():
                return compiled(block, *args, **kwargs)
            with at_rest(block.parameters()):
                return compiled(block, *args, **kwargs)
        finally:
            self._called = None


def compiled(
    model: nn.Module, layers: LayerMap, how: Literal[False, "blocks"]
) -> AbstractContextManager[CompiledBlocks | None]:
    """Return the context in which a model trains as ``Trainer(compile=)`` says."""
    return CompiledBlocks(model, layers) if how == "blocks" else nullcontext()


def _through(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a block: a function of ours, since torch compiles no module of its own that is called from outside."""
    return block._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]  # torch's


def compiled_modules(model: nn.Module, layers: LayerMap) -> list[nn.Module]:
    """Return the modules that lie in blocks as a whole, the largest ones, in order."""
    named = dict(model.named_modules())
    return [named[path] for layer in layers.blocks for path in layer.modules if path in named]


def structure(block: nn.Module, inputs: Sequence[Any] = ()) -> Hashable:
    """Return what tells a block from one that has other graphs."""
    parameters = list(block.named_parameters())
    modules = list(block.named_modules())
    return (
        tuple((path, type(each)) for path, each in modules),
        tuple((name, each.shape, each.dtype, each.device) for name, each in parameters),
        _mixed(each.requires_grad for _, each in parameters),
        _mixed(each.training for _, each in modules),
        torch.is_grad_enabled() and not block.training,
        tuple(_layout(each) for each in inputs),
        any(isinstance(each, _ConvNd) for _, each in modules) and [_is_many(each) for each in inputs].count(True),
    )


def _numbers(block: nn.Module) -> Hashable:
    """Return the numbers and words in the attributes of a block's modules: the compiler takes them for constants."""
    plain = (bool, int, float, str)
    return tuple(
        tuple((name, each) for name, each in vars(module).items() if isinstance(each, plain) and name != "training")
        for module in block.modules()
    )


def _layout(value: Any) -> Hashable:
    """Return how a tensor lies in memory, in which order its dimensions, and which are 1; the class of anything else.

    The compiler takes a size of 1 for a constant: a last batch of one sample has graphs of its own.
    """
    if not isinstance(value, Tensor):
        return str(type(value))
    order = sorted(range(value.dim()), key=value.stride)
    ones = tuple(size == 1 for size in value.shape)
    return value.dtype, value.device, value._is_view(), tuple(order), ones


def _is_many(value: Any) -> bool:
    """Return whether a batch has the 16 samples from which on torch chooses another kernel for convolutions."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] >= 16


def _mixed(flags: Iterator[bool]) -> tuple[bool, ...]:
    """Return the flags where they differ, and nothing where they are all alike."""
    known = tuple(flags)
    return known if len(set(known)) > 1 else ()


def _reason(error: BaseException) -> RecompileError | None:
    """Return the error to raise instead of one of the compiler's; None where it is not."""
    from torch._dynamo import exc

    inner = getattr(error, "inner_exception", None)
    if isinstance(inner, RecompileError):
        return inner
    if isinstance(error, (exc.TorchDynamoException, exc.BackendCompilerFailed)):
        first = str(error).strip().partition("\n")[0]
        return RecompileError(
            f"a block could not be compiled as one graph: {type(error).__name__}: {first}. What the compiler cannot follow has "
            "to leave the block's forward (a hook, a print, .item()). Write Trainer(compile=False)."
        )
    return None


__all__ = ["GRAPHS", "CompiledBlocks", "compiled", "compiled_modules", "structure"]
