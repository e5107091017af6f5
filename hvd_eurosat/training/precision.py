"""In which number format the network computes."""

from __future__ import annotations

import contextlib
import os
import timeit
import warnings
from dataclasses import dataclass

import torch

from hvd_eurosat.cluster.world import World

PROBE_SIZE, PROBES = 512, 15
WORTH_IT = 0.9  # of fp32's time, for there is casting to do


@dataclass(frozen=True)
class Precision:
    """fp32, tf32, or bf16 by autocast: weights, gradients, sums and the head's log-softmax stay fp32.

    Of GPUs; a CPU knows no tf32 and computes in fp32.
    """

    name: str

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        """The context in which forward passes run."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.name == "bf16")


def choose_precision(world: World, requested: str) -> Precision:
    """For `train.precision`, the same on all ranks: auto is bf16 where rank 0's hardware is fast at it. Collective."""
    if requested == "auto":
        requested = world.on_main(lambda: "bf16" if _is_fast_at_bf16(world.device) else "fp32")
    return precision_of(requested, requested)


def precision_of(requested: str, saved: str) -> Precision:
    """For `precision` of evaluate and predict: auto is the one of the run that saved the checkpoint.

    This process's products of fp32 matrices are from here on what they are called: torch takes tf32 for convolutions.
    """
    precision = Precision(saved if requested == "auto" else requested)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Please use the new API")  # torch 2.9's, whose compiler reads the old one
        torch.backends.cudnn.allow_tf32 = precision.name == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = precision.name == "tf32"
    return precision


def choose_algorithms(device: torch.device, deterministic: bool) -> None:
    """For `train.deterministic`, of GPUs: those that repeat their bits, or the fastest, which cuDNN tries out.

    torch warns of an operation that has no repeatable one.
    """
    if device.type == "cpu":
        return
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS' condition, before its first product
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Nothing here reads what it has not written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


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
