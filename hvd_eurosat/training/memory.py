"""What to do where a GPU's memory is too small for a step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from hvd_eurosat.errors import RunError
from hvd_eurosat.training.step import Step


@contextlib.contextmanager
def room_for(step: Step, batch_size: int) -> Iterator[None]:
    """Within the block a step is made. Where the memory is too small, RunError says how large a batch fits."""
    words = ""
    try:
        yield
    except torch.OutOfMemoryError as error:
        words = ". ".join(str(error).split(". ")[:2])
    if words:  # out of the except block, which keeps the step's tensors alive
        size = batch_size // 2
        while size and not step.fits(size):
            size //= 2
        advice = f"train.batch_size {batch_size} is too large" + (f", {size} fits" if size else ", and so is 1")
        raise RunError(f"{words}: {advice}; nvidia-smi says who else is on the GPU")
