"""What a run is about to do, said before it begins."""

from __future__ import annotations

import platform

import torch
from torch import nn

from hvd_eurosat.cluster.world import World
from hvd_eurosat.config.schema import Config, schedule_epochs
from hvd_eurosat.data.batches import TrainBatches
from hvd_eurosat.data.layout import SPLITS
from hvd_eurosat.data.tree import Tree
from hvd_eurosat.model import norm_relu
from hvd_eurosat.model.resnet import count_parameters
from hvd_eurosat.run.status import counted
from hvd_eurosat.training.features import Features
from hvd_eurosat.training.schedule import image_size, peak_rate
from hvd_eurosat.training.state import TrainingState
from hvd_eurosat.training.step import Step


def header(
    world: World,
    config: Config,
    tree: Tree,
    state: TrainingState,
    step: Step,
    batches: TrainBatches,
    taken: str,
    features: Features,
) -> dict[str, str]:
    """A line for each fact: devices, data, network, batch arithmetic, schedule. taken: what of the file of weights."""
    total, trainable = count_parameters(state.model)
    counts = {split: len(tree.files(split)) for split in SPLITS}
    train, optim, bands = config.train, config.optim, tree.inputs.bands
    side = config.data.input_side
    first = image_size(config.data, train, schedule_epochs(optim, train), 0)
    return {
        "recipe": f"{config.config or 'defaults'} -> {config.run.path}",
        "world": f"{counted(world.size, 'rank')} ({world.local_size} on this node), "
        f"{_device(world, step, state)}, {state.precision.name}"
        + (", compiled" if step.compiled else "")
        + (f", not compiled: {step.obstacle}" if step.obstacle else "")
        + (", steps as CUDA graphs" if step.captured else "")
        + (f", steps not as CUDA graphs: {step.uncaptured}" if step.uncaptured else ""),
        "data": f"{config.data.root}{' (synthetic sample)' if tree.synthetic else ''}: {len(tree.classes)} classes, "
        + ", ".join(f"{n:,} {split}" for split, n in counts.items())
        + f" images of {config.data.image_size}x{config.data.image_size}"
        + (f" in {len(bands)} bands, {', '.join(bands)}: {tree.inputs.unit}" if not tree.inputs.is_rgb else "")
        + (f", shown at {side}x{side}" if side != config.data.image_size else "")
        + (f", in training from {first}x{first} on" if first < side else ""),
        "network": f"{config.model.arch}, weights {config.model.weights}, {total:,} parameters, "
        f"{trainable:,} trainable ({config.model.trainable})",
        **({"weights": taken} if taken else {}),
        **_kept(features),
        "batches": f"{train.batch_size} x {counted(world.size, 'rank')} = {batches.global_batch} images a step; "
        f"{batches.shard:,} images a rank, {counted(batches.steps(), 'step')} an epoch, "
        f"{batches.steps() * train.epochs:,} in all",
        "optimiser": f"{optim.name}, learning rate {peak_rate(optim, batches.global_batch):g} "
        + optim.schedule
        + (f" over {counted(optim.schedule_epochs, 'epoch')}" if optim.schedule_epochs else "")
        + f", {counted(train.epochs, 'epoch')}",
    }


def _kept(features: Features) -> dict[str, str]:
    """From when on the head alone is computed, or why never; nothing where nobody would expect it."""
    if features.keeps:
        room = f"kept, {features.nbytes / 1e9:,.2f} GB a rank"
        return {"features": f"{room}: from epoch {features.first + 1} on only the head is computed"}
    return {"features": f"not kept: {features.obstacle}"} if features.obstacle else {}


def _device(world: World, step: Step, state: TrainingState) -> str:
    on_gpu = world.device.type == "cuda"
    could_be = on_gpu or any(isinstance(m, nn.BatchNorm2d) and m.training for m in state.model.modules())
    dtype = torch.bfloat16 if state.precision.name == "bf16" else torch.float32
    obstacle = norm_relu.obstacle(world.device, dtype) if could_be and not step.compiled else None
    lacking = f", BatchNorm and ReLU not fused: {obstacle}" if obstacle else ""
    if on_gpu:
        return torch.cuda.get_device_name(world.device) + lacking
    return f"{counted(world.threads, 'CPU thread')} each ({platform.machine()}{lacking})"
