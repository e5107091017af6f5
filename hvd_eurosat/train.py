"""Train the modified ResNet-50, each rank on its share of the training images. This is the main job.

horovodrun -np 8 python -m hvd_eurosat.train --config recipes/gpu.toml --data.root data
"""

from __future__ import annotations

from hvd_eurosat.cluster.command_line import answer
from hvd_eurosat.config.reading import load

if __name__ == "__main__":
    answer(load)  # before the imports below, which take seconds

from hvd_eurosat.cluster import job
from hvd_eurosat.cluster.signals import StopRequest
from hvd_eurosat.cluster.world import World
from hvd_eurosat.config.schema import Config, mixes, schedule_epochs
from hvd_eurosat.data.batches import Images, TrainBatches, by_content, open_images, ordered_batches
from hvd_eurosat.data.inputs import SAMPLED
from hvd_eurosat.data.layout import SPLITS
from hvd_eurosat.data.packed import resolve_normalisation, resolve_size
from hvd_eurosat.data.tree import Tree, open_tree
from hvd_eurosat.errors import STOPPED, Stopped
from hvd_eurosat.model.resnet import Details, LandCoverResNet, build, count_parameters
from hvd_eurosat.run.header import header
from hvd_eurosat.run.journal import Journal
from hvd_eurosat.run.predictions import write_predictions
from hvd_eurosat.training.calibration import calibrate
from hvd_eurosat.training.checkpoint import Checkpoint
from hvd_eurosat.training.features import Features
from hvd_eurosat.training.files import make_folder
from hvd_eurosat.training.inference import Network, Values, log_probabilities, tempered
from hvd_eurosat.training.memory import room_for
from hvd_eurosat.training.metrics import evaluate
from hvd_eurosat.training.precision import Precision, choose_algorithms, choose_precision, precision_of
from hvd_eurosat.training.schedule import jump, learning_rate
from hvd_eurosat.training.state import TrainingState
from hvd_eurosat.training.step import Step, class_weights
from hvd_eurosat.training.stragglers import work_of_ranks
from hvd_eurosat.weights.known import normalised
from hvd_eurosat.weights.loading import digest_of, load_weights
from hvd_eurosat.weights.settle import settle

COMPILER_PATIENCE = 5  # times run.watchdog_seconds


def train(world: World, config: Config) -> int:
    """Train, validate and save every epoch; then test the best checkpoint. Returns the job's exit status."""
    world.watch(config.run.watchdog_seconds)
    stop = StopRequest()
    world.tick("opening the data")
    tree = world.together(lambda: open_tree(config.data.root).choosing(config.data.bands))
    config = world.on_main(lambda: settled(config, tree))
    images = open_images(world, tree, SPLITS, config.data, config.data)
    tree = by_content(tree, images)
    batches = world.together(
        lambda: TrainBatches(
            images["train"],
            config.train.batch_size,
            world.rank,
            world.size,
            config.train.seed,
            mixes(config.train),
        )
    )
    journal = Journal(world, config, tree)
    start = journal.find_start()
    if start and journal.is_finished():
        predict_finished(world, config, start, journal, images["test"], tree)
        journal.show_finished()
        return 0

    world.tick("building the network")
    details = Details.of(config.model)
    settings, bands = config.model, tree.inputs.bands
    model = build(settings.arch, len(tree.classes), settings.trainable, config.train.seed, details, bands)
    model.to(world.device)
    inputs = tree.inputs.measured(images["train"].sample(SAMPLED))
    state = TrainingState(world, config, tree, model, choose(world, config, start), inputs)
    taken = begin(world, config, state, start)
    weights = world.together(lambda: class_weights(config, images["train"], len(tree.classes)))
    features = Features(world, config, state, len(images["train"]), len(images["valid"]))
    step = Step(state, world, config, weights, features)
    facts = header(world, config, tree, state, step, batches, taken, features)
    journal.begin(start, facts, state.snapshot())
    for note in tree.notes:
        journal.display.note(note)
    progress = state.epoch + state.samples / batches.length
    if start and (warning := jump(start.config, config, batches.global_batch, progress)):
        journal.display.warn(warning)
    try:
        while state.epoch < config.train.epochs:
            train_epoch(world, config, state, step, batches, journal, stop)
            world.tick(f"validation after epoch {state.epoch + 1}")
            with state.validated(images["train"], stop):
                validation = evaluate(world, config, model, state.precision, images["valid"], stop, kept=features.valid)
            sums, rate = state.sums.over_all(world), state.optimiser.param_groups[0]["lr"]
            state.end_epoch()
            journal.validated(state.epoch, state.step, rate, sums, validation)
            saved = state.snapshot()
            journal.save(saved)
            journal.commit(saved)

        world.tick("test")
        journal.saved()
        model.load_state_dict(journal.best_model(), strict=False)
        if config.valid.calibrate:
            journal.calibrated(calibrate(world, config, model, state.precision, images["valid"], stop))
        temperature = journal.temperature()
        test = evaluate(world, config, model, state.precision, images["test"], stop, temperature)
        values = predict_test(world, config, model, state.precision, temperature, images["test"], tree)
        journal.show_examples(values, images["test"])
        journal.finish(test, summary(world, model, images))
    except Stopped:
        world.tick("saving")
        journal.stopped(state.snapshot())
        return STOPPED
    except BaseException as error:
        journal.failed(error)
        raise
    finally:
        journal.close()
    return 0


def settled(config: Config, tree: Tree) -> Config:
    """With values in place of what it leaves to the data and to files of the network. Raises UserError."""
    data = normalised(resolve_size(tree, config.data), config.model.weights, tree.inputs)
    data = resolve_normalisation(tree, data)
    model = settle(config.model, len(tree.classes), data.input_side, tree.inputs.bands)
    return config.model_copy(update={"data": data, "model": model})


def choose(world: World, config: Config, start: Checkpoint | None) -> Precision:
    """The precision that the run began with, or a new run's; and, on GPUs, the kind of algorithms. Collective."""
    choose_algorithms(world.device, config.train.deterministic)
    return choose_precision(world, start.precision if start else config.train.precision)


def begin(world: World, config: Config, state: TrainingState, start: Checkpoint | None) -> str:
    """A checkpoint's state, or rank 0's weights, on every rank. Returns what of a file was taken. Collective."""
    taken = ""
    if start:
        state.restore(start)
    else:
        taken = world.on_main(lambda: load_weights(state.model, config.model).line)
        state.weights = world.on_main(lambda: digest_of(config.model.weights))
        world.broadcast(state.model.state_dict().values())
    state.seal()
    return taken


def train_epoch(
    world: World,
    config: Config,
    state: TrainingState,
    step: Step,
    batches: TrainBatches,
    journal: Journal,
    stop: StopRequest,
) -> None:
    """What is left of an epoch, every rank its shard, in steps. Collective. Raises Stopped between two steps."""
    first, epochs = state.samples, schedule_epochs(config.optim, config.train)
    step.begin_epoch()
    journal.begin_epoch(state.epoch + 1, batches.steps(first))
    for number, batch in enumerate(batches.epoch(state.epoch, first), start=1):
        patience = COMPILER_PATIENCE if number == 1 and step.compiled else 1
        world.tick(f"epoch {state.epoch + 1}, step {state.step + 1}", patience)
        progress = state.epoch + state.samples / batches.length
        rate = learning_rate(config.optim, epochs, batches.global_batch, progress)
        with room_for(step, config.train.batch_size):
            step(batch, rate, stop(), journal.wants_state())
        journal.stepped(number, step, state, state.samples - first)
        if config.run.verify_interval and state.step % config.run.verify_interval == 0:
            state.verify()
        every = config.run.checkpoint_steps
        if step.check() or (every and state.step % every == 0):
            journal.keep(state.snapshot())
    step.end_epoch()
    journal.trained(state.samples, work_of_ranks(world, step.stopwatch.take()))


def predict_finished(
    world: World, config: Config, start: Checkpoint, journal: Journal, images: Images, tree: Tree
) -> None:
    """The predictions of a run that was completed before, as it would have written them. Collective."""
    if config.run.predictions:
        model = start.build_model(world.device)
        model.load_state_dict(journal.best_model(), strict=False)
        precision = precision_of("auto", start.precision)
        predict_test(world, config, model, precision, journal.temperature(), images, tree)


def predict_test(
    world: World,
    config: Config,
    model: LandCoverResNet,
    precision: Precision,
    temperature: float,
    images: Images,
    tree: Tree,
) -> Values | None:
    """The log-probabilities of the test images, from the test's batches, on rank 0; nothing if nobody wants them.

    In files of run.predictions, too. Collective.
    """
    folder = config.run.predictions
    if not (folder or config.run.page):
        return None
    if folder:
        world.together(lambda: make_folder(folder, "run.predictions") if world.is_main else None)
    size = config.valid.images_a_step(config.data.input_side, world.device.type)
    batches = ordered_batches(images, size, world.rank, world.size)
    values = log_probabilities(world, Network(model, config.data, precision, config.valid.views), batches)
    values = tempered(values, temperature)
    names = tree.files("test")
    groups, files = [name.removeprefix("test/") for name in names], [tree.path(name) for name in names]
    if folder:
        world.together(
            lambda: write_predictions(folder, groups, files, values, tree.classes) if world.is_main else None
        )
    return values


def summary(world: World, model: LandCoverResNet, images: dict[str, Images]) -> dict[str, int]:
    """The facts of the run in summary.json, beside its results."""
    total, trainable = count_parameters(model)
    counts = {f"{split}_images": len(images[split]) for split in SPLITS}
    return {"world_size": world.size, "parameters": total, "trainable_parameters": trainable, **counts}


if __name__ == "__main__":
    job.run(load, train)
