"""What checkpoints cost: the time that one blocks training, the bytes of adapters, the way back into an epoch."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from thawline.algorithms import LoRAInject
from thawline.engine import Checkpointing, Trainer
from thawline.engine.data import ResumableLoader
from thawline.engine.snapshot import read_checkpoint
from thawline.engine.store import CheckpointStore

from .measure import Row, compared, race, ratio, told


@contextmanager
def _folder() -> Generator[Path]:
    folder = Path(tempfile.mkdtemp(dir=Path.cwd()))  # not in memory, where fsync costs nothing
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _fitted(folder: Path, device: torch.device, *, width: int, batches: int = 2, adapters: bool = False) -> Path:
    """Fit a stack of linear layers with AdamW; return its last checkpoint."""
    model = nn.Sequential(*[nn.Linear(width, width) for _ in range(8)])
    trainer = Trainer(
        algorithms=[LoRAInject(rank=8)] if adapters else [],
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        loss_fn=nn.functional.mse_loss,
        run_dir=folder,
        checkpoint=Checkpointing(frozen="fingerprint" if adapters else "store"),
        device=str(device),
        progress=False,
    )
    x = torch.randn(4, width)
    result = trainer.fit(model, [(x, x)] * batches, duration="1ep")
    assert result.last is not None
    return result.last


def saving(rounds: int, device: torch.device) -> list[Row]:
    """Saving what a fit saves, through the store, against torch.save and fsync of the same tree; wall time."""
    with _folder() as folder:
        tree = read_checkpoint(_fitted(folder / "run", device, width=1024))
        step = 0

        def ours() -> None:
            nonlocal step
            step += 1
            store.save(tree, step=step)

        def theirs() -> None:
            path = folder / "torch.pt"
            path.unlink(missing_ok=True)
            with path.open("wb") as file:
                torch.save(tree, file)
                file.flush()
                os.fsync(file.fileno())

        with CheckpointStore(folder / "store") as store:
            timings = race({"torch.save + fsync": theirs, "store": ours}, rounds)
        megabytes = (folder / "torch.pt").stat().st_size / 1e6
    mine, other = timings["store"].walls, timings["torch.save + fsync"].walls
    figure = f"a checkpoint of {megabytes:.0f} MB / torch.save and fsync, wall time"
    return [compared(figure, mine, other, 1.5, note=told(timings, "ms"))]


def adapters(_: int, device: torch.device) -> list[Row]:
    """Bytes of a checkpoint with fingerprints against those of the adapters and their optimizer state."""
    with _folder() as folder:
        last = _fitted(folder, device, width=1024, adapters=True)
        tree = read_checkpoint(last)
        moments = tree["ledger"]["optimizers"]["AdamW"]["state"]
        trained = [tree["model"][name] for name in tree["ledger"]["trainable"]]
        floor = sum(each.nbytes for each in [*trained, *(each for one in moments.values() for each in one.values())])
        size = sum(each.stat().st_size for each in last.iterdir())
    return [Row("bytes of a LoRA checkpoint", size / floor, "x", 1.2, f"{size:,} against {floor:,}")]


class _Slow(Dataset[Tensor]):
    """Samples that cost something to load."""

    def __len__(self) -> int:
        return 4096

    @override
    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(64, 64) @ torch.randn(64, 64) + index


def resuming(rounds: int, _: torch.device) -> list[Row]:
    """The first batch after a resume at an epoch's last batch, against a start at its first."""
    loader = ResumableLoader(DataLoader(_Slow(), batch_size=8, shuffle=True), seed=0)

    def first_from(start: int) -> None:
        next(loader.batches(epoch=1, start=start))

    raced = race({"first": partial(first_from, 0), "last": partial(first_from, 511)}, rounds * 5)
    return [
        ratio("resume at an epoch's last batch / at its first", raced, "last", "first", 1.25, note=told(raced, "ms"))
    ]
