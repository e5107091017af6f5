"""Every key of a run with its type, default and help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

ENV_PREFIX = "HVD_EUROSAT_"
TRAINABLE = r"^(bn\+head(,conv1)?|[a-z][a-z0-9.]*(,[a-z][a-z0-9.]*)*)$"
Fraction = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Spread = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Side = Annotated[int, Field(ge=0, le=4096)]
UserPath = Annotated[Path, AfterValidator(Path.expanduser)]


def _image_size(side: int) -> int:
    if side and not 32 <= side <= 1024:
        raise ValueError("0 or 32 to 1024 is wanted")
    return side


def _metrics_file(path: Path) -> Path:
    if path.suffix != ".prom":
        raise ValueError("a name that ends in .prom is wanted, for node_exporter reads no other")
    return path


def _views(number: int) -> int:
    if number not in (1, 8):
        raise ValueError("1 or 8 is wanted")
    return number


def _mixing(alpha: float) -> float:
    if alpha and not 0.01 <= alpha <= 10:
        raise ValueError("0 or 0.01 to 10 is wanted")
    return alpha


Mixing = Annotated[float, AfterValidator(_mixing)]
Views = Annotated[int, AfterValidator(_views)]


class Section(BaseModel):
    """Unknown keys are errors; the text below each field is its help."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Place(Section):
    """Where the images are. Other keys of [data] in a recipe or the environment are for training, and ignored here."""

    model_config = ConfigDict(extra="ignore")

    root: UserPath = Path("data")
    """folder with train/ valid/ test/, and in each a folder per class, as hvd_eurosat.prepare makes it"""
    cache_dir: UserPath | None = None
    """folder for the packed (decoded) images, for example on a node's own fast disk; default: beside the data"""


class Data(Place):
    """The images."""

    model_config = ConfigDict(extra="forbid")

    image_size: Annotated[int, AfterValidator(_image_size)] = 64
    """side in pixels of the images as they are kept; others are resized to it. 0, for train alone: the side that they
    have after resize and center_crop, which must be the same for all"""
    input_size: Annotated[int, AfterValidator(_image_size)] = 0
    """side in pixels of the images as the network sees them, to which they are brought on its device: 128 or 224,
    say, for weights that come from larger photographs. 0: image_size"""
    center_crop: Side = 0
    """cut a square of this side from the middle of each image, before it is resized to image_size; 0: the whole
    image"""
    resize: Side = 0
    """resize each image to this side in pixels before center_crop; 0: crop the image as it is"""
    bands: tuple[str, ...] = ()
    """which bands of the images, in which order: B04,B03,B02; default: all, in the order of the files"""
    mean: tuple[Number, ...] = ()
    """subtracted from each band of the pixels, which are 0 to 1 where they are 8-bit, and else the files' own numbers;
    default: ImageNet's for 8-bit RGB, the training images' own for other bands; named Sentinel-2 weights bring
    theirs"""
    std: tuple[Spread, ...] = ()
    """each band of the pixels is then divided by these; the default is as for data.mean"""
    augment: bool = True
    """flip and quarter-turn each training image: eight ways, a different one every epoch"""
    max_shift: Annotated[int, Field(ge=0, le=16)] = 0
    """shift each training image by up to this many pixels; the border is mirrored"""
    random_horizontal_flip: Probability = 0.0
    """also swap left and right of a training image with this probability"""
    random_vertical_flip: Probability = 0.0
    """also swap top and bottom of a training image with this probability"""
    random_rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    """also turn each training image by up to this many degrees either way; the border is mirrored"""
    jitter_crop: Fraction = 0.0
    """also cut a strip off each of the four borders, each up to this share of half the side, then resize"""
    random_zoom: Fraction = 0.0
    """also cut the same strip off all four borders, up to this share of half the side, then resize"""

    random_brightness: Fraction = 0.0
    """also make each training image brighter or darker by up to this share"""
    random_contrast: Fraction = 0.0
    """also move its pixels away from their mean, or towards it, by up to this share"""
    random_gain: Fraction = 0.0
    """also make the bands brighter or darker, each by its own share up to this: as haze, light, sensors do"""
    random_erase: Probability = 0.0
    """with this probability also paint a rectangle of a training image, of 2 to 33 % of its area, in data.mean"""

    @property
    def input_side(self) -> int:
        """Of the images as the network sees them, in pixels."""
        return self.input_size or self.image_size


class Model(Section):
    """The network."""

    arch: Literal["resnet50", "resnet18"] = "resnet50"
    """resnet18 is the small one, for tests and quick trials"""
    weights: str = "imagenet"
    """what to start from: imagenet (torchvision's), none (random), sentinel2-rgb-moco, sentinel2-all-moco or
    sentinel2-all-dino (SSL4EO-S12, as torchgeo publishes them), or a file: .safetensors, .pt, .pth, .h5 (Keras), a
    checkpoint of ours or of another trainer. The first convolution's kernels are taken by the names of their bands"""
    trainable: Annotated[str, Field(pattern=TRAINABLE)] = "bn+head"
    """what trains: bn+head (all BatchNorm layers and the head, which is the last layer), head, all, or whole modules by
    name: layer4,fc. bn+head becomes bn+head,conv1 where the weights know only some of the bands: then the first
    convolution trains, too"""
    layers: UserPath | None = None
    """a Keras layers.json of a ResNet-50; it says what trains and sets the five keys below"""
    variant: Literal["auto", "v1", "v1.5"] = "auto"
    """where a stage halves the image: v1.5 (torchvision) in its 3x3 convolution, v1 (Keras) in its first 1x1; auto: as
    the file of weights says"""
    bn_epsilon: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """added to BatchNorm's variances; Keras uses 1.001e-5"""
    bn_momentum: Annotated[float, Field(gt=0, le=1)] = 0.1
    """share of the new batch in BatchNorm's running statistics; Keras uses 0.01"""
    bn_affine: bool = True
    """whether BatchNorm layers have weights and biases"""
    head_bias: bool = False
    """whether the head has biases, one for each class; a head with biases is taken from the weights only then"""


class Optim(Section):
    """Optimiser and learning-rate schedule."""

    name: Literal["adam", "adamw", "sgd", "adagrad", "rmsprop", "lars", "lamb"] = "adam"
    """the optimiser; lars and lamb are for large batches"""
    lr: PositiveFloat = 0.005
    """the highest learning rate, before lr_scaling multiplies it"""
    momentum: Fraction = 0.9
    """momentum of sgd, rmsprop and lars"""
    nesterov: bool = True
    """use Nesterov's momentum; for sgd and lars"""
    beta1: Fraction = 0.9
    """decay of the running mean of gradients; for adam, adamw and lamb"""
    beta2: Fraction = 0.999
    """decay of the running mean of squared gradients; for the same"""
    eps: PositiveFloat = 1e-8
    """added to denominators; for all but sgd and lars"""
    amsgrad: bool = False
    """use AMSGrad; for adam and adamw"""
    trust: PositiveFloat = 1e-3
    """trust ratio of lars"""
    weight_decay: NonNegativeFloat = 0.0
    """weight decay; BatchNorm and the head's biases are spared"""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """factor of the learning rate for each stage that a layer lies before the head: 0.5 gives layer4 half of it, layer3
    a quarter, the first layers 1/32. Use it with model.trainable all and pretrained weights"""
    unfreeze_epochs: NonNegativeInt = 0
    """epochs after which the next stage begins to train: layer4 after the head, layer3 after layer4, the first layers
    last, after five times as many. BatchNorm's statistics follow from the beginning. 0: all train at once"""
    schedule: Literal["constant", "exponential", "step", "multistep", "cosine", "one_cycle"] = "one_cycle"
    """how the learning rate changes. exponential: times gamma after every epoch. step: times gamma after every
    step_size epochs. Both count from the end of the warm-up, in whole epochs. multistep: times gamma at milestones.
    cosine: down to 0. one_cycle: up over 30 % of the epochs, then down to 0"""
    schedule_epochs: NonNegativeInt = 0
    """epochs over which one_cycle and cosine run, and images grow (train.start_size). After them the rate stays at 0,
    and the images at full size. 0: as many as train.epochs. Set it if you will raise train.epochs later: else the rate
    jumps then"""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.95
    """factor of the learning rate in the exponential, step and multistep schedules"""
    step_size: PositiveInt = 10
    """epochs between the step schedule's steps"""
    milestones: tuple[PositiveInt, ...] = ()
    """epochs at which the multistep schedule steps, counted from the beginning; one at least, and all after the
    warm-up"""
    warmup_epochs: NonNegativeFloat = 0.0
    """first let the rate rise linearly to lr, over this many epochs. In one_cycle this replaces its own rise. Then
    cosine and one_cycle fall to 0 over the epochs that are left"""
    warmup_start: Probability = 0.0
    """share of lr at which the warm-up begins"""
    warmup_stairs: bool = False
    """let the warm-up rise after each whole epoch, as in rmldnn, not in every step"""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """linear: multiply lr by global batch / reference_batch; sqrt: by the square root of that. Use it with
    warmup_epochs"""
    reference_batch: PositiveInt = 64
    """the global batch (train.batch_size times ranks) for which lr was chosen"""
    compression: Literal["none", "fp16"] = "none"
    """fp16: send gradients between the ranks in 16 bits, which halves the traffic. It matters when all weights train"""


class Train(Section):
    """Training."""

    epochs: PositiveInt = 15
    """passes over the training images"""
    batch_size: PositiveInt = 64
    """images of each rank in a step"""
    start_size: Side = 0
    """side in pixels of the training images in the first epochs, which makes training from scratch shorter. It grows in
    steps of 16 to data.input_size. Every size has equally many epochs, and the last epoch is at full size. Where there
    are fewer epochs than sizes, the smallest are left out. 0: full size from the start"""
    ema: Fraction = 0.0
    """decay per step of a running average of the weights, 0.99 for example, which is validated, saved and exported in
    their place. BatchNorm's statistics with it are estimated after each epoch, from 1,280 training images. 0: the
    weights as they are"""
    mixup: Mixing = 0.0
    """alpha of mixup: each training image is blended with another, and so are their labels, by a share drawn from
    Beta(alpha, alpha); 0.2 is usual, 1 draws any share alike, 0 blends nothing. Training's accuracy goes by the class
    that an image shows most of"""
    cutmix: Mixing = 0.0
    """alpha of CutMix: a square of each training image is replaced by that of another, and the same share of its label
    by that image's; 1 is usual. If mixup is set as well, each image gets one of the two by chance"""
    label_smoothing: Fraction = 0.0
    """share of each label that is spread over all classes"""
    class_weights: tuple[PositiveFloat, ...] = ()
    """weights of the classes in the loss, in the order of their names. Only their ratios count: they are scaled to a
    mean of 1 over the training images. (libtorch and rmldnn divide each batch by the sum of its own weights.)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU of each rank, or the cores if this process may use no GPU. A GPU that torch cannot use is an error,
    not a reason to take the cores. All ranks have the same kind"""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """auto: bf16 where the hardware is fast at it, else fp32. GPUs since Ampere are taken to be fast. CPUs with AMX or
    AMD's AVX512-BF16 are measured at the start: do they multiply matrices faster in bf16? tf32, on GPUs since Ampere,
    is fp32 whose products keep 10 bits of their factors"""
    deterministic: bool = False
    """on GPUs: take algorithms that are meant to give the same bits every time, which nobody has tried yet; they may be
    slower. On CPUs the bits are the same anyway"""
    graphs: bool = True
    """on GPUs: make a step two CUDA graphs, which takes the host two calls instead of hundreds. false: launch kernel by
    kernel, which is slower with small batches. Try it where a step on a GPU fails or gives wrong numbers"""
    compile: bool = False
    """compile the network with torch.compile, and on GPUs the augmentation. The first step is slow. On CPUs all steps
    are slower. It needs Python.h and gcc (CC) on GPUs, g++ (CXX) on CPUs; if a rank has none, all ranks train
    uncompiled"""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """seed of random weights, of the order of the images and of their augmentation"""


class Valid(Section):
    """Validation and test."""

    batch_size: NonNegativeInt = 0
    """images per step, of each rank that validates; 0: 128 on cores, 1,024 of 64x64 on GPUs, where larger images are
    fewer, 128 at least"""
    views: Views = 1
    """1 or 8, how often each image is shown: as it is, or in its eight flips and quarter turns. Then the mean of their
    probabilities counts, and it takes eight times as long. predict, evaluate and map do as the run did"""
    calibrate: bool = True
    """after training, fit a temperature to the validation images, and divide log-probabilities by it. Then nine in ten
    answers with a probability of 0.9 should be right. It changes no class; --raw of predict, evaluate, map and export
    leaves it out"""
    sharded: bool | None = None
    """true: all ranks validate; false: rank 0 alone; the counts are the same. Default: all on GPUs, rank 0 alone on
    cores. There set it from some 64 ranks on: in an epoch of EuroSAT each of 64 trains 397 images, and rank 0 alone
    would validate 1,350"""

    def images_a_step(self, side: int, device: str) -> int:
        """On a device of this type, of images that the network sees with this side in pixels."""
        return self.batch_size or (max(128, 1024 * 64**2 // side**2) if device == "cuda" else 128)

    def ranks(self, size: int, device: str) -> int:
        """How many of the first of so many ranks, with devices of this type, validate."""
        everyone = device == "cuda" if self.sharded is None else self.sharded
        return size if everyone else 1


class Run(Section):
    """What a run leaves behind."""

    dir: UserPath | None = None
    """folder of the run; default: runs/<name of the recipe file>"""
    resume: str = "auto"
    """auto: go on from the newest checkpoint in run.dir, if there is one. never: start anew. FILE: go on from this
    checkpoint. A run that does not go on from run.dir renames that folder to run.dir.1. What the earlier run wrote
    elsewhere (logs, predictions) is moved into a folder earlier.1 beside it"""
    checkpoint_interval: PositiveInt = 1
    """epochs between checkpoints; the best so far and the last epoch are always saved"""
    checkpoint_steps: NonNegativeInt = 0
    """also save after every so many steps, unless the last checkpoint is still being written; 0: not by steps"""
    checkpoint_seconds: NonNegativeFloat = 600.0
    """also save within an epoch when the last checkpoint is this old, by rank 0's clock; 0: not by time"""
    keep: PositiveInt = 2
    """how many of the newest checkpoints to keep, beside the best"""
    on_save_error: Literal["continue", "stop"] = "continue"
    """when a checkpoint cannot be written. continue: train on, but stop after three failures in a row. stop: at once"""
    watchdog_seconds: NonNegativeFloat = 600.0
    """end the job when a rank makes no progress for this long, and name the rank; 0: never"""
    verify_interval: NonNegativeInt = 200
    """steps between checks for flipped bits: are frozen weights unchanged, and trainable ones the same on all ranks? 0:
    never"""
    numbered_checkpoints: UserPath | None = None
    """folder for a model_checkpoint_<epoch>.pt every checkpoint_interval epochs; all of them are kept"""
    outfile: UserPath | None = None
    """rmldnn's logs: x.txt gives x_train.txt, with a line for each step, and x_test.txt, with one for each
    validation"""
    page: bool = True
    """write index.html, the page of the run, in run.dir: at its start, after every epoch, every two minutes of a
    long one, and at its end"""
    metrics_file: Annotated[UserPath, AfterValidator(_metrics_file)] | None = None
    """FILE.prom for Prometheus: what status.json says, replaced every five seconds, for node_exporter's textfile
    collector"""
    predictions: UserPath | None = None
    """folder for output_1.h5 and predictions.csv of the test images, written at the end; a finished run, started again,
    writes them anew"""

    @property
    def path(self) -> Path:
        """The folder of the run, once `load` has filled in its default."""
        if self.dir is None:
            raise ValueError("run.dir is resolved by config.reading.load")
        return self.dir


class Settings(BaseSettings):
    """What a verb is told: sections of keys, from a recipe file, the environment and the command line."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        nested_model_default_partial_update=True,
        use_attribute_docstrings=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_use_class_docs_for_groups=True,
    )

    config: UserPath | None = Field(default=None, exclude=True)
    """a recipe, a file of settings in TOML or JSON; the environment and flags override it"""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The recipe file comes in as the initial values, the weakest source of all."""
        return env_settings, init_settings

    @property
    def device(self) -> str:
        """What the ranks compute on: as train.device."""
        return "auto"

    def flat(self) -> dict[str, Any]:
        """{"train.epochs": 15, ...}, in JSON's types."""
        return flatten(self.model_dump(mode="json"))


class Config(Settings):
    """Train a land-cover classifier on one process (rank), or on many that a launcher starts. Most people need:

    --config recipes/finetune.toml       a recipe: which weights train, how, and for how long
    --data.root data/EuroSAT_RGB         images in train/ valid/ test/, as python -m hvd_eurosat.prepare makes them
    --model.weights FILE                 weights of yours to start from, or none; else it starts from ImageNet's
    --train.epochs 5                     passes over the images; --train.batch_size is per rank
    --run.dir runs/first                 the folder for all that the run writes; the same command goes on from there
    """

    data: Data = Data()
    model: Model = Model()
    optim: Optim = Optim()
    train: Train = Train()
    valid: Valid = Valid()
    run: Run = Run()

    @property
    def device(self) -> str:
        """train.device."""
        return self.train.device

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        optim, epochs = self.optim, schedule_epochs(self.optim, self.train)
        if optim.warmup_epochs >= epochs:
            key = "optim.schedule_epochs" if optim.schedule_epochs else "train.epochs"
            raise ValueError(f"optim.warmup_epochs must be below {key} ({epochs})")
        if optim.unfreeze_epochs and 5 * optim.unfreeze_epochs >= epochs:
            key = "optim.schedule_epochs" if optim.schedule_epochs else "train.epochs"
            raise ValueError(f"optim.unfreeze_epochs must be below a fifth of {key} ({epochs})")
        if optim.schedule == "multistep" and min(optim.milestones, default=0) <= optim.warmup_epochs:
            raise ValueError("optim.schedule multistep wants optim.milestones, all of them after optim.warmup_epochs")
        if self.train.start_size and not 32 <= self.train.start_size <= self.data.input_side:
            key = "data.input_size" if self.data.input_size else "data.image_size"
            raise ValueError(f"train.start_size must be 0 or between 32 and {key} ({self.data.input_side})")
        return self

    def to_toml(self) -> str:
        """Every key with its value: a recipe that repeats the run."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def mixes(train: Train) -> bool:
    """Whether training images are mixed with each other."""
    return train.mixup > 0 or train.cutmix > 0


def schedule_epochs(optim: Optim, train: Train) -> int:
    """The epochs over which the learning rate and the size of the images change."""
    return optim.schedule_epochs or train.epochs


def current(sections: dict[str, Any]) -> dict[str, Any]:
    """Sections that an earlier version wrote, without what goes without saying now: that gradients are summed."""
    optim = sections.get("optim")
    if not isinstance(optim, dict) or optim.get("reduction") != "sum":
        return sections
    return {**sections, "optim": {key: value for key, value in optim.items() if key != "reduction"}}


def flatten(sections: dict[str, Any]) -> dict[str, Any]:
    """{"train": {"epochs": 15}, "split": "test"} as {"train.epochs": 15, "split": "test"}."""
    flat: dict[str, Any] = {}
    for name, value in sections.items():
        flat |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat
