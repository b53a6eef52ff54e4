"""Which of a model's tensors never changed since the fit began; a checkpoint may hold their fingerprints alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from attrs import define, field
from torch import Tensor, nn

from .errors import CheckpointError
from .ledger import ParameterLedger
from .tensorfile import bytes_of

_MOST = 3
"""How many tensors an error names."""


def fingerprint(tensor: Tensor) -> str:
    """Return dtype, shape and the SHA-256 of a tensor's values as text: equal for tensors that are equal bit for bit.

    Example:
        >>> fingerprint(torch.ones(2, 3))[:28]
        'float32 2x3 f46913286d895f62'
    """
    dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    digest = hashlib.sha256(bytes_of(dense).numpy().data).hexdigest()
    return f"{str(dense.dtype).removeprefix('torch.')} {'x'.join(map(str, dense.shape)) or 'scalar'} {digest}"


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer under each of its names, the very objects, persistent or not."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    return {**dict(model.named_parameters(remove_duplicate=False)), **buffers}


@define(eq=False)
class Pristine:
    """A model's tensors as a fit finds them.

    All of them are hashed at the beginning, and those that never trained at each asking: a model may write to its own
    weights, as the key encoder of momentum contrast does, and torch does not count writes through ``.data``.

    Args:
        model: The model, before anything of the fit has changed it.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> pristine = Pristine(model)
        >>> ledger = ParameterLedger(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> ledger.freeze("0.*", owner="me")
        >>> ledger.begin_batch(ledger.clock)
        >>> sorted(pristine.fingerprints(ledger))
        ['0.bias', '0.weight']
    """

    model: nn.Module
    _found: dict[str, str] = field(init=False)

    def __attrs_post_init__(self) -> None:
        tensors = named_tensors(self.model).items()
        self._found = {name: fingerprint(tensor) for name, tensor in tensors if _is_plain(tensor)}

    def fingerprints(self, ledger: ParameterLedger) -> dict[str, str]:
        """Return the fingerprint of each tensor that is as it was, by name.

        Args:
            ledger: Knows what has trained.
        """
        trained = {id(ledger.parameters[name]) for name in ledger.trained if name in ledger.parameters}
        found = {}
        for name, tensor in named_tensors(self.model).items():
            before = self._found.get(name)
            if before is not None and id(tensor) not in trained and _is_plain(tensor) and fingerprint(tensor) == before:
                found[name] = before
        return found

    def check(self, saved: Mapping[str, str]) -> None:
        """Compare the model with the fingerprints of a checkpoint.

        Raises:
            CheckpointError: A tensor is missing or another one; the message names the first ones that are.
        """
        if wrong := self.differing(saved):
            raise CheckpointError(
                f"the checkpoint holds only fingerprints of {len(saved)} tensors that had not trained, and the model does "
                f"not bring the same ones: {wrong}. Build the model from the weights that the run began with, or write "
                "Checkpointing(frozen='store') in the next run."
            )

    def differing(self, saved: Mapping[str, str]) -> str:
        """Return in words which tensors are not those of the fingerprints; empty where all are."""
        here = named_tensors(self.model)
        wrong = []
        for name, before in saved.items():
            tensor = here.get(name)
            if tensor is None:
                wrong.append(f"{name!r} is missing")
                continue
            now = fingerprint(tensor)
            if now != before:
                kinds = " and ".join(dict.fromkeys(each.rpartition(" ")[0] for each in (before, now)))
                wrong.append(f"{name!r} has other values or another kind ({kinds})")
        return "; ".join(wrong[:_MOST]) + (f"; and {len(wrong) - _MOST} more" if len(wrong) > _MOST else "")


def _is_plain(tensor: Tensor) -> bool:
    """Whether the tensor's values are the bytes of one dense block."""
    dense = tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_quantized
    return dense and type(tensor) in (Tensor, nn.Parameter)
