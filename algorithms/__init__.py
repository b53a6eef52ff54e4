"""The algorithms of thawline: what trains when, adapters, averages, clipping, stopping; and presets."""

from .adapter_files import load_adapter, save_adapter
from .block_cycle import BlockCycle, cycle_order
from .early_stop import EarlyStop
from .ema import EMA, ema_update
from .freeze_at import FreezeAt
from .freeze_out import FreezeOut, freeze_out_times
from .grad_clip import GradClip, clip_gradients
from .layer_freeze import LayerFreeze, freeze_layers, freeze_share
from .layer_thaw import LayerThaw, thaw_order
from .layerwise_lr import LayerwiseLR, layer_factors
from .lisa import LISA, sampled_layers
from .lora import LoRAInject, inject_lora
from .lora_forward import lora_forward
from .lora_merge import merge_lora, remove_lora, unmerge_lora
from .phases import Phase, Plateau
from .prefix_cache import PrefixCache
from .presets import chain_thaw, fine_tune, full, head_only, lora, lp_ft, partial, progressive, ulmfit
from .thaw_schedule import ThawSchedule
from .train_only import TrainOnly

__all__ = [
    "EMA",
    "LISA",
    "BlockCycle",
    "EarlyStop",
    "FreezeAt",
    "FreezeOut",
    "GradClip",
    "LayerFreeze",
    "LayerThaw",
    "LayerwiseLR",
    "LoRAInject",
    "Phase",
    "Plateau",
    "PrefixCache",
    "ThawSchedule",
    "TrainOnly",
    "chain_thaw",
    "clip_gradients",
    "cycle_order",
    "ema_update",
    "fine_tune",
    "freeze_layers",
    "freeze_out_times",
    "freeze_share",
    "full",
    "head_only",
    "inject_lora",
    "layer_factors",
    "load_adapter",
    "lora",
    "lora_forward",
    "lp_ft",
    "merge_lora",
    "partial",
    "progressive",
    "remove_lora",
    "sampled_layers",
    "save_adapter",
    "thaw_order",
    "ulmfit",
    "unmerge_lora",
]
