"""How fast the network of `map` is alone: it is shown the windows of a scene as `predict` shows it images, from memory.

python -m tests.parallel.network_only --checkpoint FILE --scene FILE --out FOLDER …      (the words of `map`)

It prints, as JSON, how many windows in how many seconds, without those of reading; what the process took before it saw
any of the scene (memory, in bytes); batch_size and precision. Nothing is written.
"""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from hvd_eurosat.cluster import job
from hvd_eurosat.cluster.world import World
from hvd_eurosat.config import verbs
from hvd_eurosat.config.verbs import MapSettings
from hvd_eurosat.data.batches import Batch
from hvd_eurosat.scene.mapping import cut, read_block
from hvd_eurosat.scene.plan import Plan, make_plan
from hvd_eurosat.scene.source import Scene, SceneOptions, open_scene
from hvd_eurosat.scene.windows import Block
from hvd_eurosat.training import checkpoint
from hvd_eurosat.training.inference import Network, infer
from hvd_eurosat.training.precision import precision_of


def main(world: World, settings: MapSettings) -> None:
    """The whole scene, block by block: read, then shown."""
    saved = checkpoint.load(settings.checkpoint)
    precision = precision_of(settings.precision, saved.precision)
    network = Network(saved.build_model(world.device), saved.data, precision, saved.views(settings.views))
    said = settings.bands, settings.offset, settings.stretch, settings.resolution, settings.mask
    paths = [str(path) for path in settings.scene]
    with open_scene(paths, saved.wants, SceneOptions(*said)) as scene:
        plan = make_plan(scene, saved, precision.name, settings, paths, world.device)
        most = max(len(images) for images in batches(plan, plan.blocks[0], zeros(scene, plan, plan.blocks[0])))
        nothing = torch.zeros(most, len(scene.bands), *2 * [plan.windows.side], dtype=torch.uint8)
        for _ in range(2):
            infer(world, network, [batch(nothing)])
        memory, seconds, windows = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, 0.0, 0
        for block in plan.blocks:
            pixels = torch.from_numpy(read_block(scene, plan, block).pixels)
            shown = [batch(images) for images in batches(plan, block, pixels)]
            began = time.perf_counter()
            infer(world, network, shown)
            seconds += time.perf_counter() - began
            windows += sum(one.total for one in shown)
    rate = {"windows": windows, "seconds": seconds, "pixels": scene.grid.width * scene.grid.height}
    print(json.dumps({**rate, "memory": memory, "batch_size": most, "precision": precision.name}))


def zeros(scene: Scene, plan: Plan, block: Block) -> Tensor:
    """A block of the scene's kind."""
    return torch.zeros(len(scene.bands), block.bottom - block.top, plan.windows.width, dtype=torch.uint8)


def batches(plan: Plan, block: Block, pixels: Tensor) -> Iterator[Tensor]:
    """All windows of a block in the batches of `predict`."""
    tops, lefts = np.meshgrid(plan.windows.tops[block.first : block.end] - block.top, plan.windows.lefts, indexing="ij")
    for some in np.array_split(np.arange(tops.size), math.ceil(tops.size / plan.batch_size)):
        yield cut(pixels, tops.ravel()[some], lefts.ravel()[some], plan.windows.side)


def batch(images: Tensor) -> Batch:
    """Images without labels."""
    count = len(images)
    return Batch(torch.arange(count), images, torch.zeros(count, dtype=torch.int64), torch.ones(count), count)


if __name__ == "__main__":
    job.run(verbs.map_scenes, main)
