"""What torch raises where weights lie in shards, said in our words."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn

from .distributed import FullyShard, Team, is_lost
from .errors import ArgumentError, DistributedError, OutOfMemoryError, ThawlineError
from .ledger import ParameterLedger
from .memory import is_out_of_memory
from .shards import is_sharded

REPLICATE = "Trainer(distributed=Replicate())"
_BF16 = "BFloat16"
# Words of torch's, and what to say of them, which may repeat torch's first line.
_SAID: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("uniform gradient dtype", "uniform original parameter dtype", "uniform reduce dtype"),
        (
            "weights of several dtypes train in one block, and torch's fully_shard adds their gradients up together. Write: "
            f"model.float() before the fit, or {REPLICATE}."
        ),
    ),
    (
        (_BF16,),
        (
            "a module of the model does not compute in bfloat16 alone: {0}. Write: Trainer(precision='bf16', distributed=FullyShard()), "
            "where torch chooses the dtype of each operation."
        ),
    ),
    (
        ("storage of size 0", "data is not allocated"),
        (
            "a backward pass went through a block after its weights had been let go of, as where torch.autograd.grad is called inside of a "
            f"batch, or a block hides its tensors in an object. Write: {REPLICATE}."
        ),
    ),
    (
        ("DTensor", "FSDP", "DeviceMesh", "sharding strategy"),
        (
            "the model, or an algorithm, does with weights in shards what these cannot do: {0}. A weight is whole only while the module is "
            "called that it lies in. Write in an algorithm: unsharded(tensor) for all of a weight or gradient, shard_like(tensor, parameter) "
            f"for this rank's rows of a whole one; else {REPLICATE}."
        ),
    ),
)


@contextmanager
def explaining(team: Team | None, ledger: ParameterLedger) -> Generator[None]:
    """Say in our words what torch raises where weights lie in shards.

    Args:
        team: The ranks, if there are any.
        ledger: Of the fit.

    Raises:
        OutOfMemoryError: Memory ran out: the others wait inside the batch, and it cannot be repeated.
        DistributedError: Another rank is gone, or the model does with its weights what shards cannot do.
    """
    try:
        yield
    except ThawlineError:
        raise
    except (RuntimeError, MemoryError, AssertionError, NotImplementedError) as error:
        explained = None if team is None or not team.shards else _explained(error, team, ledger.clock.batch)
        if explained is None:
            raise
        raise explained from error


def _explained(error: BaseException, team: Team, batch: int) -> ThawlineError | None:
    if is_out_of_memory(error):
        return OutOfMemoryError(
            f"out of memory on rank {team.rank} at batch {batch}, and where weights lie in shards a batch cannot be "
            "repeated in smaller parts by one rank alone. Write: Trainer(microbatch_size=1) or larger, or "
            "FullyShard(mixed_precision='bf16', offload=True)."
        )
    if is_lost(error):
        return team.lost(error, f"gathering weights or reducing gradients of batch {batch}")
    mixed = isinstance(team.chosen, FullyShard) and team.chosen.mixed_precision is not None
    text = str(error)
    for words, said in _SAID:
        if any(each in text for each in words) and (mixed or words != (_BF16,)):
            first = text.partition("\n")[0][:300].rstrip(".!")
            return DistributedError(f"rank {team.rank} at batch {batch}: {said.format(first)}")
    return None


def refuse_shards(call: str, model: nn.Module) -> None:
    """Raise an ArgumentError for a model whose weights lie in shards: one that a fit left so when it failed, or the user's own."""
    name = next((name for name, each in model.named_parameters() if is_sharded(each)), None)
    if name is not None:
        raise ArgumentError(
            f"Trainer.{call}(model=)", got=f"a model whose {name!r} lies in shards",
            takes="a whole model: the Trainer shards it, and gives it back whole unless a fit fails",
            example=f"model = build(); trainer.{call}(model, …)",
        )  # fmt: skip
