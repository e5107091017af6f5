"""rmldnn's JSON configuration in our terms (github.com/rocketmlhq/rmldnn, docs/src/configuration.rst).

What it says is said the same way here, key by key; a key that would mean nothing here is an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

Values = dict[str, Any]
Lower = BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)
Number = Annotated[float, Field(allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Square = Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]

ADAGRAD_EPS = 1e-10  # of libtorch; rmldnn has no key for it
BETAS = {"beta1", "beta2", "eps", "amsgrad"}
OPTIMISERS = {
    "sgd": {"momentum", "nesterov"},
    "adam": BETAS,
    "adamw": BETAS,
    "lamb": BETAS,
    "adagrad": set(),
    "rmsprop": {"momentum", "eps"},
    "lars": {"momentum", "nesterov", "eta"},
}
SCHEDULERS = {
    "exponential": {"gamma"},
    "step": {"gamma", "step_size"},
    "multistep": {"gamma", "milestones"},
    "warmup": {"num_epochs", "start_factor"},
}


DETERMINISTIC = ("image_size", "resize", "center_crop", "mean", "std")


class Part(BaseModel):
    """Unknown keys are errors, and so is text where a number is wanted."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Scheduler(Part):
    """optimizer.lr_scheduler."""

    type: Annotated[Literal["exponential", "step", "multistep", "warmup"], Lower]
    gamma: PositiveFloat = 0.1
    step_size: PositiveInt = 1
    milestones: list[PositiveInt] = []
    num_epochs: PositiveInt = 1
    start_factor: Probability = 0.0


class Optimizer(Part):
    """optimizer."""

    type: Annotated[Literal["sgd", "adam", "adamw", "adagrad", "rmsprop", "lars", "lamb"], Lower]
    learning_rate: PositiveFloat = 0.01
    weight_decay: NonNegativeFloat = 0.0
    momentum: Share = 0.0
    nesterov: bool = False
    beta1: Share = 0.9
    beta2: Share = 0.999
    eps: PositiveFloat = 1e-8
    amsgrad: bool = False
    eta: PositiveFloat = 1e-3
    lr_scheduler: Scheduler | None = None


class Normalize(Part):
    """The transform normalize; a number stands for all three channels."""

    mean: Number | Annotated[list[Number], Field(min_length=3, max_length=3)]
    std: PositiveFloat | Annotated[list[PositiveFloat], Field(min_length=3, max_length=3)]


class Transform(Part):
    """One item of data.transforms: one of these keys."""

    resize: Square | None = None
    center_crop: Square | None = None
    random_horizontal_flip: Probability | None = None
    random_vertical_flip: Probability | None = None
    random_rotate: Annotated[float, Field(ge=0, le=180)] | None = None
    jitter_crop: Share | None = None
    random_zoom: Share | None = None
    normalize: Normalize | None = None


class Data(Part):
    """data. preload asks for what is always done here."""

    input_type: Literal["images"]
    target_type: Literal["labels"] | None = None
    input_path: str | None = None
    test_input_path: str | None = None
    test_output_path: str | None = None
    batch_size: PositiveInt = 64
    test_batch_size: PositiveInt = 64
    preload: bool = False
    transforms: list[Transform] = []


class Checkpoints(Part):
    """checkpoints."""

    load: str | None = None
    save: str | None = None
    interval: PositiveInt = 1


class Loss(Part):
    """loss."""

    function: Annotated[Literal["nll"], Lower]
    weight: list[PositiveFloat] = []


class NeuralNetwork(Part):
    """neural_network, which holds everything."""

    data: Data
    num_epochs: PositiveInt = 1
    outfile: str | None = None
    layers: str | None = None
    checkpoints: Checkpoints = Checkpoints()
    optimizer: Optimizer = Optimizer(type="sgd")
    loss: Loss = Loss(function="nll")


class File(Part):
    """A configuration file."""

    neural_network: NeuralNetwork


def is_rmldnn(content: Any) -> bool:
    """Whether this is such a configuration."""
    return isinstance(content, dict) and "neural_network" in content


def translate(content: Values, verb: str) -> Values:
    """The sections that `train` or `evaluate` takes. Raises ValueError, which names the key."""
    if verb not in TRANSLATIONS:
        raise ValueError(f"an rmldnn configuration is for {' and '.join(TRANSLATIONS)}")
    try:
        network = File.model_validate(content).neural_network
    except ValidationError as error:
        raise ValueError(_first_problem(error)) from None
    return TRANSLATIONS[verb](network)


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{key} has no meaning here"
    if problem["type"] == "missing":
        return f"{key} is missing"
    return f"{key}: {problem['msg']}, got {repr(problem['input'])[:60]}"


def _train(network: NeuralNetwork) -> Values:
    data, checkpoints = network.data, network.checkpoints
    model: Values = {"weights": checkpoints.load or "none"}
    if network.layers:
        model["layers"] = network.layers
    run: Values = {"checkpoint_interval": checkpoints.interval}
    outputs = {
        "outfile": network.outfile,
        "numbered_checkpoints": checkpoints.save,
        "predictions": data.test_output_path,
    }
    return {
        "data": {"root": _root(data), **prepare(data.transforms)},
        "model": model,
        "optim": _optim(network.optimizer),
        "train": {"epochs": network.num_epochs, "batch_size": data.batch_size, "class_weights": network.loss.weight},
        "valid": {"batch_size": data.test_batch_size, "calibrate": False},  # its output is the network's own
        "run": run | {key: value for key, value in outputs.items() if value},
    }


def _root(data: Data) -> str:
    """The folder above train/ and valid/, which stand for input_path and test_input_path."""
    if data.input_path is None:
        raise ValueError("neural_network.data.input_path is missing, and training needs it")
    train = Path(os.path.normpath(data.input_path))
    if train.name != "train":
        raise ValueError(
            f"neural_network.data.input_path {train}: a folder called train is wanted, beside valid and test"
        )
    if data.test_input_path is not None and Path(os.path.normpath(data.test_input_path)) != train.parent / "valid":
        raise ValueError(
            f"neural_network.data.test_input_path {data.test_input_path}: training here validates on "
            f"{train.parent / 'valid'} and tests on {train.parent / 'test'} in the end"
        )
    return str(train.parent)


def prepare(transforms: list[Transform]) -> Values:
    """Keys of our section data. Pixels are 0..1; resize and center_crop come first and the rest in our own order.

    Where there is neither, the images keep their size.
    """
    values: Values = {"image_size": 0, "center_crop": 0, "resize": 0, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    values["augment"] = False
    seen: set[str] = set()
    for number, transform in enumerate(transforms):
        where = f"neural_network.data.transforms.{number}"
        given = transform.model_dump(exclude_none=True)
        if len(given) != 1:
            raise ValueError(f"{where}: one transform is wanted, not {len(given)}")
        ((name, value),) = given.items()
        if name in seen and name != "resize":
            raise ValueError(f"{where}.{name} is there twice")
        if name in ("resize", "center_crop"):
            _set_size(values, name, value, f"{where}.{name}")
        elif name == "normalize":
            values |= {
                key: (each,) * 3 if isinstance(each, float | int) else tuple(each) for key, each in value.items()
            }
        else:
            values[name] = value
        seen.add(name)
    return values


def _set_size(values: Values, name: str, sides: list[int], where: str) -> None:
    side = sides[0]
    if sides[1] != side:
        raise ValueError(f"{where} {sides}: a square is wanted")
    if name == "center_crop":
        values |= {"center_crop": side, "resize": values["image_size"], "image_size": side}
    else:
        values["image_size"] = side


def _optim(optimizer: Optimizer) -> Values:
    _check_keys(optimizer, OPTIMISERS[optimizer.type] | {"learning_rate", "weight_decay", "lr_scheduler"}, "optimizer")
    names = {"learning_rate": "lr", "eta": "trust"}
    values = optimizer.model_dump(exclude={"type", "lr_scheduler"})
    values = {names.get(key, key): value for key, value in values.items()} | {"name": optimizer.type}
    if optimizer.type == "adagrad":
        values["eps"] = ADAGRAD_EPS
    return values | _schedule(optimizer.lr_scheduler)


def _schedule(scheduler: Scheduler | None) -> Values:
    if scheduler is None:
        return {"schedule": "constant"}
    _check_keys(scheduler, SCHEDULERS[scheduler.type], "optimizer.lr_scheduler")
    for key in SCHEDULERS[scheduler.type] - scheduler.model_fields_set:
        raise ValueError(f"neural_network.optimizer.lr_scheduler.{key} is missing")
    if scheduler.type == "warmup":
        rise = {"warmup_epochs": scheduler.num_epochs, "warmup_start": scheduler.start_factor}
        return {"schedule": "constant", "warmup_stairs": True, **rise}
    steps = {"step_size": scheduler.step_size, "milestones": scheduler.milestones}
    return {"schedule": scheduler.type, "gamma": scheduler.gamma, **steps}


def _check_keys(part: Optimizer | Scheduler, known: set[str], where: str) -> None:
    for key in sorted(part.model_fields_set - known - {"type"}):
        raise ValueError(f"neural_network.{where}.{key} has no meaning for {part.type}")


def _evaluate(network: NeuralNetwork) -> Values:
    data = network.data
    if network.checkpoints.load is None:
        raise ValueError("neural_network.checkpoints.load is missing, and evaluation needs it")
    if data.test_input_path is None:
        raise ValueError("neural_network.data.test_input_path is missing, and evaluation needs it")
    values = {"checkpoint": network.checkpoints.load, "input": data.test_input_path, "batch_size": data.test_batch_size}
    expected = {key: value for key, value in prepare(data.transforms).items() if key in DETERMINISTIC}
    values |= {"expected": {**expected, **({"layers": network.layers} if network.layers else {})}}
    return values | ({"out": data.test_output_path} if data.test_output_path else {})


TRANSLATIONS: dict[str, Callable[[NeuralNetwork], Values]] = {"train": _train, "evaluate": _evaluate}
