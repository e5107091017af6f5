"""Checkpoints: everything that a run depends on, in files that are whole or not there."""

from __future__ import annotations

import dataclasses
import io
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from hvd_eurosat import __version__
from hvd_eurosat.config.schema import Config, Data, Model, Valid, flatten, schedule_epochs
from hvd_eurosat.data.inputs import Inputs, inputs_of
from hvd_eurosat.data.listing import normal
from hvd_eurosat.errors import RunError, UserError
from hvd_eurosat.model.resnet import Details, LandCoverResNet, build
from hvd_eurosat.training.files import replacing, write_text
from hvd_eurosat.training.schedule import saved_schedule
from hvd_eurosat.weights.loading import digest_of, load_weights
from hvd_eurosat.weights.stored import Blob, Record, named, read_content, read_record

FORMAT = 2
# The images' digest decides, wherever they are.
ON_GPUS = ("train.device", "train.graphs", "train.deterministic")
MAY_DIFFER = ("train.epochs", *ON_GPUS, "valid.", "run.", "data.cache_dir", "data.root")
VERSIONS = {"hvd_eurosat": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `epoch` epochs and `samples` samples of the next, in `step` steps.

    model: state dict with the BatchNorm statistics averaged over the ranks, or with train.ema estimated at the end of
    the last epoch; frozen: the weights that do not train, by name; rank_buffers: float32 [world size, n], each rank's
    own statistics, flattened; sums: float64 [world size, 4], each rank's Sums of the epoch in progress; config: the
    resolved configuration (nested keys); digest: of the data's content; precision: the one that the run took; history:
    the events of metrics.jsonl; seconds: of training in the epoch in progress; image_side: of the training images'
    files in pixels, None where unknown; inputs: see data.inputs.Inputs, None where it was not noted; weights: the
    digest of model.weights' file, if it is one; live: with train.ema, the weights that train as training goes on with
    them, where model has their average; share: of the steps in that average, as Average.share; temperatures: by the
    number of views that an image is shown in, as FILE.json has them; arrival: of a snapshot on its way from a GPU, see
    copies.whole.
    """

    model: dict[str, Tensor]
    frozen: list[str]
    optimiser: dict[str, Any]
    rank_buffers: Tensor
    sums: Tensor
    epoch: int
    samples: int
    step: int
    config: dict[str, Any]
    classes: list[str]
    digest: str
    precision: str
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    image_side: int | None = None
    inputs: dict[str, Any] | None = None
    weights: str | None = None
    live: dict[str, Tensor] = field(default_factory=dict)
    share: float = 0.0
    temperatures: dict[int, float] = field(default_factory=dict)
    arrival: Any = None

    @property
    def data(self) -> Data:
        """How any image is prepared: where a part is cut out of it, at the size of the training images' files."""
        data = Data(**self.config["data"])
        if not data.center_crop or data.resize or not self.image_side:
            return data
        return data.model_copy(update={"resize": self.image_side})

    def views(self, asked: int | None) -> int:
        """In how many of its views each image is shown: as asked, or else as in the run."""
        return asked or Valid(**self.config["valid"]).views

    def batch_size(self, asked: int, device: torch.device) -> int:
        """Images per step on a device: as asked, or else as in the run, had it had such a device."""
        return asked or Valid(**self.config["valid"]).images_a_step(self.data.input_side, device.type)

    def temperature(self, views: int) -> float:
        """By which log-probabilities are divided; 1 where none was fitted."""
        return temperature(self.temperatures, views)

    @property
    def wants(self) -> Inputs:
        """What the numbers in its images are: as noted, or known by the classes."""
        return Inputs.model_validate(self.inputs) if self.inputs else inputs_of(self.classes)

    @property
    def metric(self) -> float | None:
        """Validation accuracy, a fraction, at the end of an epoch."""
        events = [event for event in self.history if event["event"] == "valid" and event["epoch"] == self.epoch]
        return float(events[-1]["accuracy"]) if events and not self.samples else None

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return f"epoch-{self.epoch:04d}" + (f"-step-{self.step:08d}" if self.samples else "")

    def size_on_disk(self, copies: int) -> int:
        """The bytes that so many checkpoints like this one take, with two numbers a weight for the optimiser."""
        frozen = sum(tensor.nbytes for name, tensor in self.model.items() if name in self.frozen)
        changing = sum(tensor.nbytes for tensor in self.model.values()) - frozen
        live = sum(tensor.nbytes for tensor in self.live.values())
        return frozen + copies * (3 * changing + live + self.rank_buffers.nbytes)

    def build_model(self, device: torch.device) -> LandCoverResNet:
        """The network as it was validated."""
        settings = Model(**self.config["model"])
        bands, details = self.wants.bands, Details.of(settings)
        with torch.device("meta"):  # no random weights are drawn, which takes half a second
            model = LandCoverResNet(settings.arch, len(self.classes), settings.trainable, details, bands)
        layouts = {4: torch.channels_last}
        model.load_state_dict(
            {
                name: tensor.to(device, copy=True, memory_format=layouts.get(tensor.ndim, torch.contiguous_format))
                for name, tensor in self.model.items()
            },
            assign=True,
        )
        return model

    def check_resumable(self, config: Config, classes: Sequence[str], digest: str) -> None:
        """Raise UserError, by name, if the run would not go on as the same run."""
        was, now = flatten(self.config), config.flat()
        if other := min((key for key in was.keys() ^ now.keys() if not key.startswith(MAY_DIFFER)), default=None):
            raise UserError(
                f"cannot resume: the checkpoint is of another version of hvd_eurosat (see {other}): use another run.dir"
            )
        *_, before = saved_schedule(self.config)
        if before == schedule_epochs(config.optim, config.train):  # by whichever key
            now["optim.schedule_epochs"] = was.get("optim.schedule_epochs")
        for key in sorted(was.keys() | now.keys()):
            same = was.get(key) == now.get(key) or self._is_moved(key, was.get(key), now.get(key))
            if not same and not key.startswith(MAY_DIFFER):
                raise UserError(
                    f"cannot resume: {key} was {was.get(key)!r} and is {now.get(key)!r} now "
                    f"(take it back, or another run.dir)"
                )
        if list(map(normal, self.classes)) != list(classes):
            names = ", ".join(self.classes)
            raise UserError(f"cannot resume: the checkpoint knows the classes {names} (give them, or another run.dir)")
        if self.digest != digest:
            raise UserError(
                f"cannot resume: the images of {config.data.root} are not those that the run began with "
                f"(give those, or another run.dir)"
            )

    def _is_moved(self, key: str, was: Any, now: Any) -> bool:
        """Whether a file is the one that it was, at another place or by another name of its place."""
        if key == "model.layers":
            return bool(was and now)  # what it says is in other keys
        if key != "model.weights":
            return False
        same_place = Path(was).expanduser().resolve() == Path(now).expanduser().resolve()
        return same_place or (self.weights is not None and digest_of(now) == self.weights)


def load(path: Path, frozen: bool = True) -> Checkpoint:
    """Read a checkpoint onto the CPU; nothing in it is executed. Raises UserError if it is not a whole one.

    best.json and last.json stand for the checkpoints that they name. frozen: with the weights that do not train, where
    they are in a file of their own.
    """
    path = named(path)
    content, record = read_content(path, frozen), read_record(path)
    try:
        checkpoint = Checkpoint(**content, temperatures=record.temperatures)
        noted = (record.epoch, record.step, record.samples)
    except TypeError:
        raise UserError(f"checkpoint {path}: not a checkpoint of this version of hvd_eurosat") from None
    if record.format != FORMAT or (checkpoint.epoch, checkpoint.step, checkpoint.samples) != noted:
        raise UserError(f"checkpoint {path}: its .json does not belong to it")
    return checkpoint


def load_mended(path: Path, report: Callable[[str], None], weights: str | None = None) -> Checkpoint:
    """`load`, where lost or damaged frozen weights are made again, as the run made them, written and reported.

    weights: model.weights where its file is now, if not where it was. Raises UserError if the trained part is not
    whole, or where the frozen weights do not come out as they were.
    """
    path = named(path)
    trained, blob = load(path, frozen=False), read_record(path).frozen
    if blob is None:
        return trained
    try:
        return load(path)
    except UserError as error:
        damage = str(error)
    source = weights or trained.config["model"]["weights"]
    made = _made_again(trained, source)
    if Blob.of(blob.file, made) != blob:
        raise FrozenLostError(f"{damage}; model.weights gives others now: put either back as it was")
    with replacing(path.parent / Path(blob.file).name) as file:
        file.write(made)
    report(f"{damage}; it was made again from model.weights {source}")
    return load(path)


class FrozenLostError(UserError):
    """Frozen weights cannot be made again, while the trained ones may well be whole."""


def _made_again(trained: Checkpoint, weights: str) -> bytes:
    """The file of the frozen weights, from model.weights and train.seed. Raises FrozenLostError."""
    settings = Model(**{**trained.config["model"], "weights": weights})
    seed, details, bands = trained.config["train"]["seed"], Details.of(settings), trained.wants.bands
    model = build(settings.arch, len(trained.classes), settings.trainable, seed, details, bands)
    try:
        load_weights(model, settings)
    except (UserError, RunError) as error:
        raise FrozenLostError(f"the frozen weights are damaged, and cannot be made again: {error}") from None
    return frozen_content(model.state_dict(), trained.frozen)


def frozen_content(model: dict[str, Tensor], names: list[str]) -> bytes:
    """A safetensors file of the weights of these names."""
    return safetensors.torch.save({name: model[name].contiguous() for name in names})


def holds(path: Path, checkpoint: Checkpoint) -> bool:
    """Whether FILE.pt is this very checkpoint, whole, whatever the clock said."""
    try:
        if not path.with_suffix(".json").exists():
            return False
        return _same(*({**vars(one), "seconds": 0.0} for one in (load(path), checkpoint)))
    except UserError:
        return False


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(type(one) is type(other) and one == other)


def write(checkpoint: Checkpoint, path: Path, frozen: Blob | None) -> Record:
    """Write FILE.pt, without the frozen weights if they are in a file of their own, and last FILE.json.

    Raises RunError where the disk is full or gone; then no part is left.
    """
    buffer = io.BytesIO()
    model = {name: tensor for name, tensor in checkpoint.model.items() if not frozen or name not in checkpoint.frozen}
    fields = vars(dataclasses.replace(checkpoint, model=model))
    torch.save({name: value for name, value in fields.items() if name not in ("temperatures", "arrival")}, buffer)
    content = buffer.getvalue()
    with replacing(path) as file:
        file.write(content)
    record = Record(
        format=FORMAT,
        epoch=checkpoint.epoch,
        step=checkpoint.step,
        samples=checkpoint.samples,
        metric=checkpoint.metric,
        world_size=len(checkpoint.rank_buffers),
        content=Blob.of(path.name, content),
        frozen=frozen,
        versions=VERSIONS,
        temperatures=checkpoint.temperatures,
    )
    try:
        write_record(path, record)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return record


def write_record(path: Path, record: Record) -> None:
    """Write FILE.json of FILE.pt. Raises RunError where the disk is full or gone."""
    write_text(path.with_suffix(".json"), record.model_dump_json(indent=2) + "\n")


def temperature(temperatures: Mapping[int, float], views: int) -> float:
    """That of so many views; 1 where none was fitted."""
    return temperatures.get(views, 1.0)
