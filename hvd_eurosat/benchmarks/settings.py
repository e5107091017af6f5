"""What the subcommands of `benchmark` are told: every key of a training run, and a few of their own."""

from __future__ import annotations

from pathlib import Path

from pydantic import NonNegativeFloat, PositiveInt

from hvd_eurosat.config.schema import Config, UserPath

MODES = ("bn+head", "all")


class StepSettings(Config):
    """Images per second of a training step and of a whole epoch with its validation, for bn+head and all. Beside them
    stand Horovod's example, and that example in our precision and channels_last. There are as many ranks as mpirun or
    horovodrun starts, or as --hosts has slots. Weights are random. Of the keys of train, data.root, data.image_size,
    model.arch and train.batch_size hold for the example, too. Other keys of the step hold for ours alone, and keys of a
    whole run have no effect.
    """

    steps: PositiveInt = 50
    """measured steps of each case (ours or the example, bn+head or all), in up to five equal rounds; fewer take less
    time. project: in three rounds, and as many steps again in which no gradients are exchanged"""
    hosts: str = ""
    """hosts to run on, as name:slots,name:slots, where slots are ranks; default: this machine"""
    interface: str = ""
    """the network interface that the hosts share, if they have several"""

    @property
    def folder(self) -> Path:
        """Of the results: run.dir, or runs/benchmark."""
        return self.run.dir or Path("runs/benchmark")

    def training(self) -> Config:
        """Only what a training run is told; validated again, it would read the environment again."""
        return Config.model_construct(**{name: getattr(self, name) for name in Config.model_fields})


class ScalingSettings(StepSettings):
    """Images per second of 1 to N ranks, each with its own cores or GPU. Weak scaling compares them with as many
    independent jobs of one rank, side by side on the same cores. The column "in lockstep" is the share of their rate
    that these would keep if each waited for the slowest after every step. What is missing there is due to uneven cores,
    not to the job. Strong scaling shares out one batch.
    """

    cores: PositiveInt = 1
    """cores of each rank, where there are no GPUs"""


class ProjectSettings(ScalingSettings):
    """Make a model of the time of a step from the ranks' work and allreduces of two ranks. Check it against steps in
    which ranks exchange gradients, and project the efficiency of up to 1,024 ranks. With --link it only checks the
    model that an earlier call has fitted.
    """

    link: NonNegativeFloat = 0.0
    """rate of the links between the hosts in Gbit/s, to check the model over them; 0: fit the model"""


class MemorySettings(StepSettings):
    """Peak memory of a rank, alone and as one of four. Pages that ranks share, such as the packed images, count
    once."""


class DataSettings(StepSettings):
    """Images per second of the way of the data: batches alone, and beside the step that trains. They come from memory
    and from a cold disk, of which the packed images are dropped before. "none" is the same step with one batch over and
    over. Measure on an idle machine, and let nobody else map the same packed images: what is mapped stays in memory.
    """


class GpuSettings(StepSettings):
    """Images per second of one GPU: bn+head, all and head; 32 to 1,024 images a step; kernel by kernel, as CUDA graphs,
    and compiled. Beside each: how often the host launches something in a step, how busy the GPU is, which share of its
    own bf16 and memory rates the step takes, and the seconds of an epoch that are not steps. Then whole runs of
    `train`, of 50 epochs from random weights, with their seconds after start-up.
    """


class JobSettings(Config):
    """One job that a subcommand starts."""

    modes: tuple[str, ...] = MODES
    """values of model.trainable, in turn"""
    warm_up: PositiveInt = 3
    """steps that do not count"""
    steps: PositiveInt = 10
    """steps that do"""
    out: UserPath
    """folder for <rank>.json"""
    cores: int = 0
    """bind each rank to so many cores of its own; 0: do not"""
    beside: int = 0
    """so many independent one-rank jobs side by side instead of one job of that many ranks"""
    apart: bool = False
    """steps take turns with as many in which no rank waits for another, which are measured too"""
    messages: bool = False
    """time allreduces of several sizes, too"""
    memory: bool = False
    """sample the memory meanwhile"""
    validation: bool = False
    """time a validation, too"""
    reading: bool = False
    """time the way of the data, too"""


class GpuJobSettings(JobSettings):
    """The job of `benchmark gpu`."""

    sizes: tuple[int, ...]
    """images of a step, in turn"""
