"""The architecture as rules over the syntax trees of the packages; each rule is shown to fail on a bad module.

A rule is a function from a :class:`Module` to the :class:`Breach` objects it finds, with examples of what it
forbids and of what it allows. A new module takes its place in ``TIERS``.
"""

import ast
import importlib
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Literal

import pytest
from attrs import frozen

from trees import Breach, Module, Package, calls, chain, dotted, is_self, is_super, last_name, line_of, stores, writes

ROOT = Path(__file__).resolve().parents[1]

# A module imports from earlier tiers and from its own, never from a later one, and never in a cycle.
TIERS: tuple[frozenset[str], ...] = (
    frozenset({"typing", "errors", "keywords", "log", "clock", "events", "schedule", "curves", "schedules"}),
    frozenset({"forward_order", "splits", "layers", "selectors", "surgery", "shards"}),
    frozenset(
        {"homes", "footprint", "twin", "holds", "groups", "grafts", "modes", "invariants", "books", "rates", "ledger"}
        | {"replay"}
    ),
    frozenset({"state"}),
    frozenset({"algorithm"}),
    frozenset({"engine", "functions"}),
    frozenset(
        {"data", "mistyped", "forward", "meters", "settings", "monitor", "precision", "distributed", "plan", "progress"}
        | {
            "backward_cost",
            "compiling",
            "batches",
            "flops",
            "randomness",
            "keyed",
            "order",
            "stateful",
            "layering",
            "shift",
            "criterion",
        }
        | {"jsontext", "tensorfile", "codec", "snapshot", "lock", "store", "rundir", "checkpoint", "resume"}
        | {"checkpointing", "expanded", "pristine", "unlisted", "weights"}
        | {"comet", "tracking", "signals", "workers", "shares", "buckets", "buffers", "differences"}
    ),
    frozenset(
        {
            "evaluation",
            "foresight",
            "recipe",
            "memory",
            "shard_errors",
            "sharding",
            "nonfinite",
            "ranks",
            "report",
            "run",
            "step",
            "trainer",
        }
    ),
    frozenset(
        {
            "doubles",
            "neighbor",
            "trace",
            "specimens",
            "variants",
            "surroundings",
            "onlookers",
            "shown",
            "picture",
            "graphs",
            "rehearsal",
            "promises",
            "checks",
            "records",
            "endings",
            "account",
            "audit",
            "audits",
            "logbook",
            "other_batches",
            "other_forms",
            "other_loaders",
            "other_models",
            "bearer",
            "recovering",
            "resuming",
            "unaided",
            "tasks",
            "examples",
            "derivatives",
            "closed_forms",
            "drawn_fits",
            "ranked",
        }
        | {"conformance", "oracle", "machine", "strategies", "testing"}
    ),
    frozenset({"__init__"}),
)
# The ledger is several files, `rates` half of its calls. `books` carries out what it decides, `grafts` is its hand on the model, `replay` attaches what a checkpoint has; the others read parameter groups and optimizer state.
LEDGER = {"ledger", "books"}
LEDGER_HANDS = {"ledger", "replay", "rates", "books", "grafts"}
LEDGER_READERS = {"ledger", "books", "footprint", "homes", "groups", "invariants"}
# Who takes part and what they say is `distributed`; how torch's FSDP2 exchanges the parameters of a model is `sharding`,
# which puts them back as they were at the end.
DISTRIBUTED = {"distributed", "sharding"}
MODEL_HANDS = LEDGER_HANDS | {"sharding"}
# What tests of algorithms and schedules are written with; never imported by the rest.
TEST_KIT = {"testing", "strategies", "machine"}
TRACKER_PACKAGES = {"comet_ml", "wandb", "mlflow", "tensorboard"}
HEAVY_PACKAGES = {"hypothesis", "matplotlib", "rich", "sklearn", "structlog", "torchmetrics", "transformers"}
PICKLING = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "copyreg"}
MOST_LINES = 500

Rule = Callable[[Module], Iterator[Breach]]


@frozen
class Law:
    """A rule with what it says, and examples as ``"package/module: source"``."""

    says: str
    rule: Rule
    forbids: tuple[str, ...]
    allows: tuple[str, ...]


LAWS: dict[str, Law] = {}


def law(says: str, *, forbids: Sequence[str], allows: Sequence[str]) -> Callable[[Rule], Rule]:
    """Enter a rule in the table of laws."""

    def enter(rule: Rule) -> Rule:
        LAWS[rule.__name__] = Law(says, rule, tuple(forbids), tuple(allows))
        return rule

    return enter


# -- who imports what -----------------------------------------------------------------------------------------


def engine_imports(module: Module) -> Iterator[tuple[str, int]]:
    """Yield the engine's modules that one of them imports, lazily and for types too."""
    for each in module.imports:
        if each.dots == 1 and each.source:
            yield each.source.partition(".")[0], each.line
        elif each.dots == 1:
            yield from ((name if name in _known() else "__init__", each.line) for name in each.names)


@cache
def _known() -> frozenset[str]:
    return frozenset().union(*TIERS)


@law(
    "a module of the engine imports only from its own tier and earlier ones, also lazily and for types",
    forbids=(
        "engine/clock: from .ledger import ParameterLedger",
        "engine/ledger: def f():\n    from .trainer import Trainer",
        "engine/layers: from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .state import State",
        "engine/trainer: from . import testing",
        "engine/ledger: from . import Engine",
        "engine/unheard_of: x = 1",
        "engine/ledger: from .unheard_of import x",
    ),
    allows=(
        "engine/trainer: from .clock import Clock\nfrom .plan import Plan",
        "engine/store: from .codec import flatten",
        "engine/__init__: from .testing import tiny\nfrom .trainer import Trainer",
        "engine/clock: import typing",
    ),
)
def imports_point_one_way(module: Module) -> Iterator[Breach]:
    """Follow the chain of the design."""
    if module.package != "engine":
        return
    tier = {name: index for index, names in enumerate(TIERS) for name in names}
    if module.name not in tier:
        yield Breach(1, f"engine/{module.name}.py has no place in TIERS of tests/test_architecture.py")
        return
    for name, line in engine_imports(module):
        if name not in tier:
            yield Breach(line, f"imports .{name}, which has no place in TIERS of tests/test_architecture.py")
        elif tier[name] > tier[module.name]:
            yield Breach(line, f"imports .{name}, which stands after {module.name}")


@law(
    "inside the packages own code is imported relatively",
    forbids=(
        "engine/clock: import engine",
        "engine/clock: from engine.errors import ArgumentError",
        "engine/clock: def f():\n    import thawline.engine.errors",
        "algorithms/ema: from thawline.engine import Event",
        "algorithms/ema: import algorithms.clip as clip",
        "engine/algorithm: import importlib\nimportlib.import_module('thawline.algorithms')",
    ),
    allows=("engine/clock: from .errors import ArgumentError", "algorithms/ema: from ..engine import Event"),
)
def own_imports_are_relative(module: Module) -> Iterator[Breach]:
    """Forbid the absolute names, under which a user's own module might be found."""
    for each in module.imports:
        if not each.dots and each.source.partition(".")[0] in {"thawline", "engine", "algorithms"}:
            yield Breach(each.line, f"imports {each.source} absolutely")


@law(
    "the engine never imports algorithms, and names none",
    forbids=(
        "engine/trainer: from ..algorithms import EMA",
        "engine/trainer: from .. import algorithms",
        "engine/trainer: def f(each):\n    return isinstance(each, EMA)",
        "engine/trainer: def f(algorithms):\n    return algorithms.LayerThaw",
    ),
    allows=("engine/trainer: def f():\n    'Such as EMA.'\n    return 'LayerThaw'",),
)
def engine_knows_no_algorithm(module: Module) -> Iterator[Breach]:
    """Forbid the package and the classes in it."""
    if module.package != "engine":
        return
    for each in module.imports:
        if each.dots > 1:
            yield Breach(each.line, f"imports from outside the package: {'.' * each.dots}{each.source}")
    for node in ast.walk(module.tree):
        named = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
        if named in {"LayerThaw", "LayerFreeze", "LayerwiseLR", "LoRAInject", "EMA", "GradClip", "EarlyStop"}:
            yield Breach(line_of(node), f"names the algorithm {named}")


@law(
    "algorithms import from `..engine` what thawline.engine re-exports, and from each other",
    forbids=(
        "algorithms/ema: from ..engine.ledger import ParameterLedger",
        "algorithms/ema: from .. import engine",
        "algorithms/ema: from ..engine import _private",
        "algorithms/ema: from ..engine import *",
        "algorithms/ema: from ...engine import Event",
    ),
    allows=("algorithms/ema: from ..engine import Algorithm, Event, State", "algorithms/presets: from .ema import EMA"),
)
def algorithms_use_the_public_engine(module: Module) -> Iterator[Breach]:
    """Forbid every other way into the engine."""
    for each in module.imports:
        if module.package != "algorithms" or each.dots < 2:
            continue
        if each.dots > 2 or each.source != "engine":
            yield Breach(each.line, f"imports {'.' * each.dots}{each.source}; write `from ..engine import …`")
        for name in each.names if each.source == "engine" else ():
            if name not in _public():
                yield Breach(each.line, f"imports {name}, which is not in thawline.engine.__all__")


def _public() -> frozenset[str]:
    return frozenset(getattr(importlib.import_module("thawline.engine"), "__all__", ()))


@law(
    "only the ledger reaches its parts that change the model and the optimizers",
    forbids=("engine/trainer: from .grafts import apply_graft", "engine/holds: from . import books"),
    allows=("engine/ledger: from .grafts import apply_graft",),
)
def hands_are_the_ledgers(module: Module) -> Iterator[Breach]:
    """Keep `grafts` and `books` behind the ledger."""
    for name, line in engine_imports(module):
        if name in LEDGER_HANDS - {"ledger", "replay"} and not module.is_one_of(LEDGER_HANDS):
            yield Breach(line, f"imports .{name}; call the ledger")


@law(
    "only distributed.py and sharding.py import torch.distributed",
    forbids=(
        "engine/trainer: import torch.distributed as dist",
        "engine/trainer: from torch import distributed",
        "engine/data: from torch.distributed.fsdp import fully_shard",
        "engine/data: import torch\nrank = torch.distributed.get_rank()",
    ),
    allows=(
        "engine/distributed: import torch.distributed as dist",
        "engine/sharding: from torch.distributed.fsdp import fully_shard",
        "engine/trainer: from .distributed import rank",
        "engine/trainer: def f(self):\n    return self.distributed",
    ),
)
def only_distributed_is_distributed(module: Module) -> Iterator[Breach]:
    """Forbid the import and the attribute."""
    if module.is_one_of(DISTRIBUTED):
        return
    for each in module.imports:
        full = {each.source, *(f"{each.source}.{name}" for name in each.names)}
        if not each.dots and any(name == "torch.distributed" or name.startswith("torch.distributed.") for name in full):
            yield Breach(each.line, "imports torch.distributed; use engine/distributed.py")
    for node in module.nodes(ast.Attribute):
        if dotted(node) == "torch.distributed":
            yield Breach(node.lineno, "uses torch.distributed; use engine/distributed.py")


@law(
    "trackers are imported by the tracking modules only, and lazily",
    forbids=(
        "engine/trainer: def f():\n    import comet_ml",
        "engine/comet: import comet_ml",
        "engine/comet: try:\n    from comet_ml import Experiment\nexcept ImportError:\n    pass",
    ),
    allows=(
        "engine/comet: def f():\n    import comet_ml",
        "engine/comet: from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import comet_ml",
    ),
)
def trackers_are_lazy(module: Module) -> Iterator[Breach]:
    """Forbid trackers elsewhere, and at import."""
    for each in module.imports:
        if not each.dots and each.source.partition(".")[0] in TRACKER_PACKAGES:
            if not module.is_one_of({"comet", "tracking"}):
                yield Breach(each.line, f"imports {each.source}; only the tracking modules may")
            elif each.place == "module":
                yield Breach(each.line, f"imports {each.source} when it is imported; move it into the function")


@law(
    "heavy packages are imported inside the function that needs them",
    forbids=(
        "engine/plan: import matplotlib.pyplot as plt",
        "algorithms/ema: from transformers import AutoModel",
        "engine/progress: class Bar:\n    import rich",
    ),
    allows=(
        "engine/plan: def f():\n    import matplotlib.pyplot as plt",
        "engine/testing: import hypothesis",
        "engine/log: from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import structlog",
    ),
)
def heavy_packages_are_lazy(module: Module) -> Iterator[Breach]:
    """Forbid what would slow every import down."""
    for each in module.imports:
        heavy = not each.dots and each.source.partition(".")[0] in HEAVY_PACKAGES
        # lora_conv1d holds a subclass of what it imports, and is itself imported only where a model is made of that.
        lazy = module.is_one_of(TEST_KIT) or (module.package, module.name) == ("algorithms", "lora_conv1d")
        if heavy and each.place == "module" and not lazy:
            yield Breach(each.line, f"imports {each.source} when it is imported; move it into the function")


@law(
    "nothing that is read can run code: no pickle, torch.load, eval or exec",
    forbids=(
        "engine/store: import pickle",
        "engine/store: def f():\n    from pickle import loads",
        "engine/store: import torch\ntorch.save({}, 'x')",
        "engine/store: from torch import load",
        "algorithms/ema: import torch\nx = torch.load('x', weights_only=True)",
        "engine/codec: eval('1')",
        "engine/codec: exec('x = 1')",
        "engine/codec: import yaml\nyaml.load('x', yaml.Loader)",
        "engine/codec: import numpy as np\nnp.load('x')",
    ),
    allows=(
        "engine/trainer: def f(model):\n    model.eval()",
        "engine/codec: import json\njson.load(open('x'))",
        "engine/codec: import yaml\nyaml.safe_load('x')",
    ),
)
def no_pickle(module: Module) -> Iterator[Breach]:
    """Forbid the modules and the calls."""
    calls = {"torch.load", "torch.save", "torch.serialization.load", "torch.jit.load", "torch.package.PackageImporter"}
    calls |= {
        "yaml.load",
        "yaml.full_load",
        "yaml.unsafe_load",
        "np.load",
        "numpy.load",
        "eval",
        "exec",
        "builtins.exec",
    }
    for each in module.imports:
        full = {each.source, *(f"{each.source}.{name}" for name in each.names)}
        if not each.dots and (each.source.partition(".")[0] in PICKLING or full & calls):
            yield Breach(each.line, f"imports {', '.join(sorted(full - {''}))}")
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute | ast.Name) and dotted(node) in calls:
            yield Breach(node.lineno, f"uses {dotted(node)}")


# -- who changes what -----------------------------------------------------------------------------------------


@law(
    "only the ledger sets requires_grad",
    forbids=(
        "engine/trainer: def f(p):\n    p.requires_grad = False",
        "algorithms/thaw: def f(p):\n    p.requires_grad_(False)",
        "algorithms/thaw: def f(ps):\n    list(map(torch.Tensor.requires_grad_, ps))",
        "engine/surgery: def f(p):\n    for p.requires_grad in (True,): pass",
        "engine/surgery: def f(p):\n    p.requires_grad, x = True, 1",
        "engine/data: def f(p):\n    object.__setattr__(p, 'requires_grad', True)",
        "engine/data: def f(p):\n    setattr(p, 'requires_grad', True)",
    ),
    allows=(
        "engine/ledger: def f(p):\n    p.requires_grad = False",
        "algorithms/thaw: def f(p):\n    return p.requires_grad",
        "algorithms/lora: def f(t):\n    return nn.Parameter(t, requires_grad=False)",
    ),
)
def requires_grad_is_the_ledgers(module: Module) -> Iterator[Breach]:
    """Reading is free; assigning in any form, and the method, are not."""
    if module.is_one_of(LEDGER):
        return
    for node in stores(module):
        if isinstance(node, ast.Attribute) and node.attr == "requires_grad":
            yield Breach(node.lineno, "sets requires_grad; call ledger.freeze or ledger.thaw")
    for node in module.nodes(ast.Attribute):
        if node.attr == "requires_grad_":
            yield Breach(node.lineno, "uses requires_grad_; call ledger.freeze or ledger.thaw")
    for call in calls(module, "setattr", "__setattr__"):
        if any(isinstance(each, ast.Constant) and each.value == "requires_grad" for each in call.args):
            yield Breach(call.lineno, "sets requires_grad; call ledger.freeze or ledger.thaw")


def _is_groups(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "param_groups"


@law(
    "only the ledger changes parameter groups; its parts read them, nobody else touches them",
    forbids=(
        "algorithms/lr: def f(o):\n    return o.param_groups[0]['lr']",
        "engine/trainer: def f(o):\n    o.add_param_group({})",
        "engine/trainer: def f(o):\n    return getattr(o, 'param_groups')",
        "engine/homes: def f(o):\n    o.param_groups[0]['lr'] = 1.0",
        "engine/homes: def f(o):\n    for group in o.param_groups:\n        group['lr'] = 1.0",
        "engine/homes: def f(o):\n    for i, group in enumerate(o.param_groups):\n        group.update(lr=1.0)",
        "engine/invariants: def f(o):\n    group = o.param_groups[0]\n    del group['lr']",
        "engine/invariants: def f(o):\n    o.param_groups.append({})",
    ),
    allows=(
        "engine/ledger: def f(o):\n    o.param_groups[:] = []",
        "engine/homes: def f(o):\n    return {id(p) for group in o.param_groups for p in group['params']}",
        "algorithms/lr: def f(ledger):\n    return ledger.groups",
    ),
)
def groups_are_the_ledgers(module: Module) -> Iterator[Breach]:
    """Forbid the attribute outside the ledger, and writes in its parts."""
    if module.is_one_of(LEDGER):
        return
    for call in calls(module, "add_param_group"):
        yield Breach(call.lineno, "calls add_param_group; the ledger derives the groups")
    if module.is_one_of(LEDGER_READERS):
        for node in writes(module, _is_groups):
            yield Breach(line_of(node), "changes param_groups; that is done in ledger.py")
        return
    for node in ast.walk(module.tree):
        if _is_groups(node) or (isinstance(node, ast.Call) and _gets(node, "param_groups")):
            yield Breach(line_of(node), "touches param_groups; use ledger.groups, ledger.scale or ledger.set_lr")


def _gets(call: ast.Call, name: str) -> bool:
    literals = (each.value for each in call.args if isinstance(each, ast.Constant))
    return last_name(call.func) in {"getattr", "setattr", "__setattr__", "delattr"} and name in literals


def _is_optimizer(node: ast.AST) -> bool:
    names = (last_name(each).lower() for each in chain(node))
    return any("optim" in name or name == "opt" for name in names)


def _is_optimizer_state(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "state" and _is_optimizer(node.value)


@law(
    "only the ledger changes optimizer state; its parts read it, nobody else touches it",
    forbids=(
        "algorithms/ema: def f(optimizer, p):\n    return optimizer.state[p]",
        "engine/checkpoint: def f(self):\n    self.optimizers[0].load_state_dict({})",
        "engine/precision: def f(opt):\n    opt.state.clear()",
        "engine/invariants: def f(optimizer, p):\n    optimizer.state.pop(p, None)",
        "engine/homes: def f(optimizer, p):\n    state = optimizer.state\n    state[p] = {}",
    ),
    allows=(
        "engine/ledger: def f(self, p):\n    self.optimizers[0].state.pop(p, None)",
        "engine/invariants: def f(optimizer, p):\n    return p in optimizer.state",
        "engine/trainer: def f(run):\n    return run.state.optimizers",
        "algorithms/ema: def f(engine):\n    return engine.state",
    ),
)
def optimizer_state_is_the_ledgers(module: Module) -> Iterator[Breach]:
    """Forbid the attribute outside the ledger, and writes in its parts."""
    if module.is_one_of(LEDGER):
        return
    for call in calls(module, "load_state_dict"):
        if isinstance(call.func, ast.Attribute) and _is_optimizer(call.func.value):
            yield Breach(call.lineno, "loads an optimizer's state; call ledger.load_state_dict")
    if module.is_one_of(LEDGER_READERS):
        for node in writes(module, _is_optimizer_state):
            yield Breach(line_of(node), "changes optimizer.state; that is done in ledger.py")
        return
    for node in module.nodes(ast.Attribute):
        if _is_optimizer_state(node):
            yield Breach(node.lineno, "touches optimizer.state; use ledger.state_dict")


@law(
    "only the ledger drops gradients",
    forbids=(
        "engine/trainer: def f(p):\n    p.grad = None",
        "algorithms/clip: def f(p):\n    del p.grad",
        "algorithms/clip: def f(p):\n    p.grad *= 2",
        "engine/run: def f(optimizer):\n    optimizer.zero_grad()",
        "engine/run: def f(p):\n    setattr(p, 'grad', None)",
    ),
    allows=(
        "engine/ledger: def f(p):\n    p.grad = None",
        "algorithms/clip: def f(p):\n    p.grad.mul_(2)",
        "engine/run: def f(ledger):\n    ledger.clear_gradients()",
    ),
)
def gradients_are_dropped_by_the_ledger(module: Module) -> Iterator[Breach]:
    """Forbid assigning `.grad`; changing its values in place is an algorithm's business."""
    if module.is_one_of(LEDGER):
        return
    for node in stores(module):
        if isinstance(node, ast.Attribute) and node.attr == "grad":
            yield Breach(node.lineno, "assigns .grad; call ledger.clear_gradients, or change the gradient in place")
    for call in module.nodes(ast.Call):
        if last_name(call.func) == "zero_grad" or _gets(call, "grad"):
            yield Breach(call.lineno, "drops gradients; call ledger.clear_gradients")


@law(
    "only the ledger attaches modules and parameters to a model; ops build them",
    forbids=(
        "engine/surgery: def f(m, p):\n    m.register_parameter('lora_A', p)",
        "algorithms/lora: def f(m, p):\n    m.add_module('x', p)",
        "algorithms/lora: def f(m, p):\n    setattr(m, 'lora_A', p)",
        "algorithms/lora: def f(m, p):\n    m.lora_A = nn.Parameter(p)",
        "algorithms/lora: def f(m):\n    m.head = torch.nn.Linear(1, 1)",
        "algorithms/lora: def f(m):\n    m.__class__ = LoRALinear",
        "algorithms/lora: def f(m, p):\n    m._parameters['lora_A'] = p",
        "algorithms/lora: def f(m):\n    m._modules.pop('head')",
        "algorithms/lora: def f(m):\n    delattr(m, 'lora_A')",
    ),
    allows=(
        "engine/grafts: def f(m, p):\n    m.register_parameter('lora_A', p)",
        "engine/surgery: def f(t):\n    return nn.Parameter(t)",
        "engine/testing: class M(nn.Module):\n    def __init__(self):\n        self.head = nn.Linear(1, 1)",
        "engine/testing: class M(nn.Module):\n    def __init__(self):\n        self.register_parameter('bias', None)",
        "engine/clock: class T:\n    def __init__(self):\n        object.__setattr__(self, 'value', 1)",
        "engine/keywords: def f(kind, name, method):\n    type.__setattr__(kind, name, method)",
        "engine/layers: class L:\n    def f(self):\n        self._modules['x'] = ()",
        "engine/layers: def f(m):\n    return m._parameters['weight']",
    ),
)
def models_are_changed_by_the_ledger(module: Module) -> Iterator[Breach]:
    """Forbid attaching to anything but the module being defined (`self`)."""
    if module.is_one_of(MODEL_HANDS):
        return
    attach = "attaches to a module; build an Attachment and call ledger.attach"
    for call in calls(module, "add_module", "register_module", "register_parameter", "register_buffer"):
        owner = call.func.value if isinstance(call.func, ast.Attribute) else call.func
        if not (is_self(owner) or is_super(owner)):
            yield Breach(call.lineno, attach)
    for call in calls(module, "setattr", "delattr", "__setattr__", "__delattr__"):
        # object.__setattr__ goes past nn.Module's registration: what it sets is a plain attribute. type's is for classes.
        is_plain = isinstance(call.func, ast.Attribute) and dotted(call.func.value) in {"object", "type"}
        if not is_plain and not (call.args and is_self(call.args[0])):
            yield Breach(call.lineno, attach)
    for node in module.nodes(ast.Assign):
        for target in node.targets:
            is_own = isinstance(target, ast.Attribute) and is_self(target.value)
            if isinstance(target, ast.Attribute) and not is_own and _builds_a_part(node.value):
                yield Breach(node.lineno, attach)
    for target in stores(module):
        if isinstance(target, ast.Attribute) and target.attr == "__class__":
            yield Breach(target.lineno, "changes a class; build an Attachment(new_class=...)")
    for written in writes(module, _is_registry):
        yield Breach(line_of(written), attach)


def _builds_a_part(value: ast.AST) -> bool:
    called = dotted(value.func) if isinstance(value, ast.Call) else ""
    first, _, last = called.rpartition(".")
    return last in {"Parameter", "Buffer"} or (first in {"nn", "torch.nn"} and last[:1].isupper())


def _is_registry(node: ast.AST) -> bool:
    registries = {"_parameters", "_modules", "_buffers"}
    return isinstance(node, ast.Attribute) and node.attr in registries and not is_self(node.value)


@law(
    "a module is one concept: up to about 400 lines",
    forbids=("engine/clock: " + "x = 1\n" * (MOST_LINES + 1),),
    allows=("engine/clock: " + "x = 1\n" * 400,),
)
def modules_are_short(module: Module) -> Iterator[Breach]:
    """Forbid files that want to be two."""
    lines = len(module.source.splitlines())
    if lines > MOST_LINES:
        yield Breach(1, f"has {lines} lines; over about 400 it wants to be two concepts")


# -- the tests ------------------------------------------------------------------------------------------------


def _modules() -> Iterator[Module]:
    packages: tuple[Package, ...] = ("engine", "algorithms")
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield Module(package, path.relative_to(ROOT / package).with_suffix("").as_posix(), path.read_text("utf-8"))


def _example(text: str) -> Module:
    place, _, source = text.partition(": ")
    package, _, name = place.partition("/")
    return Module("engine" if package == "engine" else "algorithms", name, source)


def _examples(kind: Literal["forbids", "allows"]) -> list[tuple[str, str]]:
    return [(name, text) for name, law in LAWS.items() for text in getattr(law, kind)]


@pytest.mark.parametrize("name", LAWS)
def test_the_packages_keep_the_law(name: str) -> None:
    """No module of engine/ or algorithms/ breaks the rule."""
    found = [
        f"{module.package}/{module.name}.py:{breach.line}: {breach.what}"
        for module in _modules()
        for breach in LAWS[name].rule(module)
    ]
    assert not found, f"{LAWS[name].says}:\n" + "\n".join(found)


@pytest.mark.parametrize(("name", "text"), _examples("forbids"))
def test_a_law_is_broken_by_what_it_forbids(name: str, text: str) -> None:
    """The rule finds the fault in a module that has one."""
    assert list(LAWS[name].rule(_example(text))), f"not found by {name}:\n{text}"


@pytest.mark.parametrize(("name", "text"), _examples("allows"))
def test_a_law_is_kept_by_what_it_allows(name: str, text: str) -> None:
    """The rule lets pass what the design permits."""
    assert not list(LAWS[name].rule(_example(text))), f"found by {name}:\n{text}"


def _cycle(modules: Iterable[Module]) -> list[str]:
    graph = {
        (module.package, module.name): {
            (module.package, name.partition(".")[0])
            for each in module.imports
            if each.dots == 1
            for name in ([each.source] if each.source else each.names)
        }
        for module in modules
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [f"{package}/{name}" for package, name in error.args[1]]
    return []


def test_no_import_cycle() -> None:
    """No two modules import each other, not even lazily or for types."""
    assert not _cycle(_modules())


@pytest.mark.parametrize(
    "second",
    [
        "from .clock import Clock",
        "def f():\n    from . import clock",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .clock import Clock",
    ],
)
def test_a_cycle_is_found(second: str) -> None:
    """Two modules that import each other are a cycle, wherever the import stands."""
    assert _cycle([Module("engine", "clock", "from .errors import E"), Module("engine", "errors", second)])


def test_each_module_stands_once_in_the_table() -> None:
    """The tiers do not overlap."""
    assert sum(len(tier) for tier in TIERS) == len(_known())


@pytest.mark.parametrize("package", ["thawline.engine", "thawline.algorithms"])
def test_the_packages_export_what_they_list(package: str) -> None:
    """Every name of ``__all__`` is there, once, and documented."""
    module = importlib.import_module(package)
    assert hasattr(module, "__all__"), f"{package} does not say what is public"
    assert len(set(module.__all__)) == len(module.__all__)
    missing = [name for name in module.__all__ if not hasattr(module, name)]
    assert not missing
    bare = [name for name in module.__all__ if callable(item := getattr(module, name)) and not item.__doc__]
    assert not bare, f"without a docstring: {bare}"


def _run(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("package", ["thawline.engine", "thawline.algorithms"])
def test_importing_loads_nothing_heavy(package: str) -> None:
    """Beyond torch itself, the import loads no optional package and no compiler."""
    heavy = sorted({*TRACKER_PACKAGES, *HEAVY_PACKAGES, "torch._dynamo", "torch._inductor"})
    loaded = _run(f"""
        import sys, torch
        before = set(sys.modules)
        import {package}
        print(*sorted(set({heavy}) & (set(sys.modules) - before)))
    """)
    assert not loaded


@pytest.mark.parametrize("package", ["thawline.engine", "thawline.algorithms"])
def test_importing_changes_nothing(package: str) -> None:
    """The import sets no handler, seed, thread count, filter or hook."""
    changed = _run(f"""
        import logging, os, random, signal, sys, threading, warnings
        import numpy, torch

        def world():
            loggers = [logging.getLogger(), *(logging.getLogger(each) for each in list(logging.root.manager.loggerDict))]
            return {{
                "signals": [signal.getsignal(each) for each in signal.valid_signals()],
                "handlers": [(log.name, each) for log in loggers for each in log.handlers
                             if not isinstance(each, logging.NullHandler)],
                "level": logging.getLogger().level,
                "torch seed": (torch.initial_seed(), torch.get_rng_state().tolist()),
                "random seed": random.getstate(),
                "numpy seed": str(numpy.random.get_state()),
                "threads": (torch.get_num_threads(), torch.get_num_interop_threads(), threading.active_count()),
                "precision": (torch.get_default_dtype(), torch.get_float32_matmul_precision()),
                "determinism": torch.are_deterministic_algorithms_enabled(),
                "warnings": list(warnings.filters),
                "hooks": (sys.excepthook, sys.unraisablehook, threading.excepthook, list(sys.meta_path)),
                "environment": dict(os.environ),
                "path": list(sys.path),
            }}

        before = world()
        import {package}
        after = world()
        print(*(name for name in before if before[name] != after[name]))
    """)
    assert not changed
