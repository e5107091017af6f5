"""The main job: train the modified ResNet-50 on every rank's shard of the training images.

horovodrun -np 8 python -m hvd_eurosat.train --config recipes/finetune.toml --data.root data
"""

from __future__ import annotations

import time

from hvd_eurosat import cluster
from hvd_eurosat.cluster import World
from hvd_eurosat.config import Config, load
from hvd_eurosat.data.batches import Images, TrainBatches, open_images, ordered_batches
from hvd_eurosat.data.tree import SPLITS, Tree, open_tree
from hvd_eurosat.model.resnet import Details, LandCoverResNet, build, count_parameters
from hvd_eurosat.model.settle import settle
from hvd_eurosat.model.weights import load_weights
from hvd_eurosat.training.checkpoint import Checkpoint
from hvd_eurosat.training.header import header
from hvd_eurosat.training.inference import log_probabilities, write_predictions
from hvd_eurosat.training.journal import Journal
from hvd_eurosat.training.metrics import Evaluation, evaluate
from hvd_eurosat.training.optimiser import build_optimiser, learning_rate
from hvd_eurosat.training.outfile import Outfile
from hvd_eurosat.training.precision import Precision, choose_precision
from hvd_eurosat.training.statistics import averaged_statistics, put_statistics
from hvd_eurosat.training.step import Step, check_compiler, class_weights


def train(world: World, config: Config) -> None:
    """Train, validate and save every epoch; then test the best checkpoint."""
    world.together(lambda: check_compiler(config, world.device))
    tree = world.together(lambda: open_tree(config.data.root))
    world.agree("data", {"classes": tree.classes, "content": tree.digest})
    images = open_images(world, tree, SPLITS, config.data, config.data)
    batches = world.together(
        lambda: TrainBatches(images["train"], config.train.batch_size, world.rank, world.size, config.train.seed)
    )
    settled = world.on_main(lambda: settle(config.model, len(tree.classes)))
    config = config.model_copy(update={"model": settled})
    journal = Journal(world, config, tree)
    start = journal.find_start()
    if start and journal.is_finished():
        return

    details = Details.of(config.model)
    model = build(config.model.arch, len(tree.classes), config.model.trainable, config.train.seed, details)
    model.to(world.device)
    set_weights(world, config, model, start)
    optimiser = build_optimiser(model, config.optim)
    if start:
        optimiser.load_state_dict(start.optimiser)
    chosen = Precision(start.precision) if start else choose_precision(config.train.precision, world.device)
    precision = world.from_main(chosen)
    weights = world.together(lambda: class_weights(config, images["train"], len(tree.classes)))
    step = Step(model, optimiser, world, config, precision, weights)
    journal.begin(start, header(world, config, tree, model, batches, precision))
    outfile = Outfile(world, config, start.epoch if start else 0)

    for epoch in range(start.epoch if start else 0, config.train.epochs):
        train_epoch(world, config, step, batches, epoch, journal, outfile)
        with averaged_statistics(model, world) as every_rank:
            validation = evaluate_split(world, config, model, images["valid"], precision)
            state = Checkpoint(
                model=model.state_dict(),
                optimiser=optimiser.state_dict(),
                rank_buffers=every_rank,
                epoch=epoch + 1,
                step=(epoch + 1) * batches.steps,
                config=config.model_dump(mode="json"),
                classes=list(tree.classes),
                digest=tree.digest,
                precision=precision.name,
            )
            journal.validated(state, validation)
            outfile.validated(epoch + 1, validation)
        world.wait()

    best = journal.best_checkpoint()
    if best:
        model.load_state_dict(best.model)
    world.broadcast(model.state_dict().values())
    test = evaluate_split(world, config, model, images["test"], precision)
    if config.run.predictions:
        predict_test(world, config, model, images["test"], tree, precision)
    journal.finish(test, summary(world, model, images))
    world.wait()


def set_weights(world: World, config: Config, model: LandCoverResNet, start: Checkpoint | None) -> None:
    """Rank 0's weights on every rank; after a checkpoint, also each rank's own BatchNorm statistics. Collective."""
    if start:
        model.load_state_dict(start.model)
        same_world = len(start.rank_buffers) == world.size
        put_statistics(model, start.rank_buffers[world.rank] if same_world else start.rank_buffers.mean(0))
        return
    world.together(lambda: load_weights(model, config.model.weights, config.model.arch) if world.is_main else None)
    world.broadcast(model.state_dict().values())


def train_epoch(
    world: World,
    config: Config,
    step: Step,
    batches: TrainBatches,
    epoch: int,
    journal: Journal,
    outfile: Outfile,
) -> None:
    """Every rank its shard of the epoch (from 0), in steps. Collective."""
    began = time.perf_counter()
    global_batch = config.train.batch_size * world.size
    journal.begin_epoch(epoch + 1, batches.steps)
    for number, batch in enumerate(batches.epoch(epoch)):
        progress = epoch + number * global_batch / batches.length
        rate = learning_rate(config.optim, config.train.epochs, global_batch, progress)
        loss = step(batch, epoch, rate)
        outfile.stepped(loss, step.parameters, rate)
        journal.stepped(number + 1, step.sums)
    outfile.trained(epoch + 1)
    sums = step.sums.take(world)
    journal.trained(epoch + 1, (epoch + 1) * batches.steps, sums, rate, time.perf_counter() - began)


def evaluate_split(
    world: World, config: Config, model: LandCoverResNet, images: Images, precision: Precision
) -> Evaluation:
    """The model on a split: rank 0 alone, or all ranks with valid.sharded; the sums on every rank. Collective."""
    shards = world.size if config.valid.sharded else 1
    mine = ordered_batches(images, config.valid.batch_size, world.rank, shards) if world.rank < shards else ()
    return evaluate(model, mine, config.data, precision, world)


def predict_test(
    world: World, config: Config, model: LandCoverResNet, images: Images, tree: Tree, precision: Precision
) -> None:
    """The log-probabilities of the test images, in files, from the batches that the test took. Collective."""
    batches = ordered_batches(images, config.valid.batch_size, world.rank, world.size)
    values = log_probabilities(world, model, batches, config.data, precision)
    if config.run.predictions and world.is_main:
        files = tree.files("test")
        names = [name.removeprefix("test/") for name in files]
        write_predictions(config.run.predictions, names, [tree.root / name for name in files], values, tree.classes)


def summary(world: World, model: LandCoverResNet, images: dict[str, Images]) -> dict[str, int]:
    """The facts of the run in summary.json, beside its results."""
    total, trainable = count_parameters(model)
    counts = {f"{split}_images": len(images[split]) for split in SPLITS}
    return {"world_size": world.size, "parameters": total, "trainable_parameters": trainable, **counts}


if __name__ == "__main__":
    cluster.run(load, train)
