"""The algorithms of thawline: what trains when, adapters, averages, clipping, stopping; and presets."""

from .early_stop import EarlyStop
from .ema import EMA, ema_update
from .grad_clip import GradClip, clip_gradients
from .layer_freeze import LayerFreeze, freeze_layers, freeze_share
from .layer_thaw import LayerThaw, thaw_order
from .layerwise_lr import LayerwiseLR, layer_factors
from .lora import LoRAInject, inject_lora
from .lora_modules import lora_forward
from .phases import Phase, Plateau
from .presets import full, head_only, lora, partial, progressive
from .thaw_schedule import ThawSchedule
from .train_only import TrainOnly

__all__ = [
    "EMA",
    "EarlyStop",
    "GradClip",
    "LayerFreeze",
    "LayerThaw",
    "LayerwiseLR",
    "LoRAInject",
    "Phase",
    "Plateau",
    "ThawSchedule",
    "TrainOnly",
    "clip_gradients",
    "ema_update",
    "freeze_layers",
    "freeze_share",
    "full",
    "head_only",
    "inject_lora",
    "layer_factors",
    "lora",
    "lora_forward",
    "partial",
    "progressive",
    "thaw_order",
]
