"""In which number format the network computes."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """fp32, or bf16 by autocast: weights, gradients, sums and the head's log-softmax stay fp32."""

    name: str

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        """The context in which forward passes run."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.name == "bf16")


def choose_precision(requested: str, device: torch.device) -> Precision:
    """The precision for `train.precision`: auto takes bf16 where the hardware is fast at it."""
    if requested != "auto":
        return Precision(requested)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return Precision("bf16" if fast else "fp32")
