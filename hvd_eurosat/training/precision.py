"""In which number format the network computes."""

from __future__ import annotations

import contextlib
import timeit
from dataclasses import dataclass

import torch

from hvd_eurosat.cluster.world import World

PROBE_SIZE, PROBES = 512, 15
WORTH_IT = 0.9  # of fp32's time, for there is casting to do


@dataclass(frozen=True)
class Precision:
    """fp32, or bf16 by autocast: weights, gradients, sums and the head's log-softmax stay fp32."""

    name: str

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        """The context in which forward passes run."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.name == "bf16")


def choose_precision(world: World, requested: str) -> Precision:
    """For `train.precision`, the same on all ranks: auto is bf16 where rank 0's hardware is fast at it. Collective."""
    if requested != "auto":
        return Precision(requested)
    return world.on_main(lambda: Precision("bf16" if _is_fast_at_bf16(world.device) else "fp32"))


def precision_of(requested: str, saved: str) -> Precision:
    """For `precision` of evaluate and predict: auto is the one of the run that saved the checkpoint."""
    return Precision(saved if requested == "auto" else requested)


def _is_fast_at_bf16(device: torch.device) -> bool:
    """Of CPUs this is measured, for some have bf16 and multiply matrices slower in it: a Xeon without AMX by 40 %.

    By turns and by the least, so that neither a machine that drifts nor one that is shared turns the answer.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    pairs = [(_product_seconds(torch.bfloat16), _product_seconds(torch.float32)) for _ in range(PROBES)]
    return min(bf16 for bf16, _ in pairs) < WORTH_IT * min(fp32 for _, fp32 in pairs)


def _product_seconds(dtype: torch.dtype) -> float:
    """Of one product of two matrices."""
    matrix = torch.ones(PROBE_SIZE, PROBE_SIZE, dtype=dtype)
    return timeit.timeit(lambda: matrix @ matrix, number=1)
