"""A rank that exchanges with itself over Horovod, on a GPU over NCCL: what came of it, as a line of JSON.

With one rank a sum is the number itself, read early or late; but a number that Horovod doubles on its way is not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from typing import Any

import torch

from hvd_eurosat.cluster import job
from hvd_eurosat.cluster.backend import horovod
from hvd_eurosat.cluster.world import World
from hvd_eurosat.config.schema import Config
from hvd_eurosat.model.resnet import build
from tests.gpu.loop import CLASSES, SMALL, WHOLE, Loop, Scale, apart, configuration, weights

SUMS, NUMBERS = 50, 2**20
LATE = 10**7  # cycles of the GPU, some ms: the numbers are there long after the host has asked for their sum
ADDED = (torch.float16, torch.float32, torch.float64, torch.int32, torch.int64)
SENT = (*ADDED, torch.uint8)


def doubled(device: torch.device, aside: bool = False) -> tuple[int, float]:
    """How many of SUMS are wrong where they are read as soon as the host has them, and ms that the host waits for one.

    aside: read on a stream that does not wait for them.
    """
    hvd, gpu = horovod(), device.type == "cuda"
    stream: Any = torch.cuda.stream(torch.cuda.Stream()) if aside and gpu else contextlib.nullcontext()
    values, found, waited = torch.zeros(NUMBERS, device=device), [], 0.0
    for number in range(SUMS):
        if gpu:
            torch.cuda._sleep(LATE)
        values.fill_(number)
        began = time.perf_counter()
        hvd.synchronize(hvd.allreduce_async_(values, name="doubled", op=hvd.Sum, prescale_factor=2.0))
        waited += time.perf_counter() - began
        with stream:
            found.append(values.clone())
    if gpu:
        torch.cuda.synchronize()
    wanted = 2.0 * torch.arange(SUMS, device=device)
    return int((torch.stack(found) != wanted[:, None]).any(1).sum()), 1000 * waited / SUMS


def collectives(world: World) -> list[str]:
    """Those that give back other than they were given, of each type."""
    exchanging = dataclasses.replace(world, size=2)  # else it would spare itself the exchange
    wrong = []
    for dtype in SENT:
        values = torch.arange(100, device=world.device).to(dtype)
        sent = values.clone()
        exchanging.broadcast([sent])
        if not torch.equal(sent, values):
            wrong.append(f"broadcast of {dtype}")
        if dtype in ADDED and not torch.equal(exchanging.sum(values), values):
            wrong.append(f"sum of {dtype}")
        if not torch.equal(exchanging.stack(values), values[None]):
            wrong.append(f"stack of {dtype}")
    network = build(SMALL.arch, CLASSES, "all", 0).to(world.device).state_dict()
    before = {name: tensor.clone() for name, tensor in network.items()}
    exchanging.broadcast(network.values())
    return wrong + [f"broadcast of {name}" for name, tensor in network.items() if not torch.equal(tensor, before[name])]


def trained(scale: Scale, graphs: bool, exchanges: bool, compression: str = "none") -> torch.Tensor:
    """The weights after some steps whose gradients go through Horovod, or stay here."""
    config = configuration(scale, "sgd", "all", deterministic=True)
    config = config.model_copy(update={"optim": config.optim.model_copy(update={"compression": compression})})
    loop = Loop(config, scale.device, graphs)
    loop.step.gradients._exchanges = exchanges
    loop.losses(8)
    return weights(loop)


def main(world: World, config: Config) -> None:
    """Of a job of one rank."""
    gpu = world.device.type == "cuda"
    scale = WHOLE if gpu else SMALL
    wrong, waited = doubled(world.device)
    plain = {graphs: trained(scale, graphs, exchanges=False) for graphs in {gpu, False}}
    found = {
        "wrong": wrong,
        "ms": waited,
        "collectives": collectives(world),
        "aside": doubled(world.device, aside=True)[0],
        "steps": [graphs for graphs in plain if not torch.equal(trained(scale, graphs, exchanges=True), plain[graphs])],
        "fp16": max(apart(trained(scale, graphs, True, "fp16"), plain[graphs]) for graphs in plain),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    job.run(lambda _: Config(), main)
