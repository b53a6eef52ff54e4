"""The figures by name: each function measures one and returns its rows."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .adapters import adapting
from .distributed import distributed
from .freezing import ledger, steps
from .kernels import averaging, clipping
from .large import large
from .loops import construction, event, importing, step
from .measure import Row
from .prefix import prefix
from .saving import adapters, resuming, saving

Figure = Callable[[int, torch.device], list[Row]]
FIGURES: dict[str, Figure] = {
    "step": step,
    "event": event,
    "ema": averaging,
    "clipping": clipping,
    "lora": adapting,
    "frozen": steps,
    "freezing": ledger,
    "prefix": prefix,
    "import": importing,
    "construction": construction,
    "saving": saving,
    "adapters": adapters,
    "resuming": resuming,
    "large": large,
    "distributed": distributed,
}
