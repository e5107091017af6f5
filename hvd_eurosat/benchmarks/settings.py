"""What the subcommands of `benchmark` are told: every key of a training run, and a few of their own."""

from __future__ import annotations

from pathlib import Path

from pydantic import NonNegativeFloat, PositiveInt

from hvd_eurosat.config.schema import Config, UserPath

MODES = ("bn+head", "all")


class StepSettings(Config):
    """Images per second of the training step and of a whole epoch with its validation, for bn+head and all, beside
    Horovod's example and that in our precision and channels_last. As many ranks as it is started with (mpirun,
    horovodrun), or as hosts have slots. Weights are random. Of the keys of train, data.root, data.image_size,
    model.arch and train.batch_size are the example's too; those of the step are ours alone; those of a whole run say
    nothing here.
    """

    steps: PositiveInt = 50
    """measured steps of each contender and mode, in up to five rounds of equal length (project: in three, and as many
    steps without the exchange of gradients); they bound the time it takes"""
    hosts: str = ""
    """hosts to run on, as name:slots,name:slots; default: this machine"""
    interface: str = ""
    """the network interface that the hosts share, where they have several"""

    @property
    def folder(self) -> Path:
        """Of the results: run.dir, or runs/benchmark."""
        return self.run.dir or Path("runs/benchmark")

    def training(self) -> Config:
        """Only what a training run is told; validated again, it would read the environment again."""
        return Config.model_construct(**{name: getattr(self, name) for name in Config.model_fields})


class ScalingSettings(StepSettings):
    """Images per second of 1 to N ranks, each with its own cores or GPU. Weak scaling is measured against as many
    independent jobs of one rank, side by side on the same cores. Beside it stands the share of their rate that these
    would keep if each waited for the slowest after every step (in lockstep): what is missing there is how unevenly the
    cores work, not what the job costs. Strong scaling shares out one batch.
    """

    cores: PositiveInt = 1
    """cores of each rank, where there are no GPUs"""


class ProjectSettings(ScalingSettings):
    """A model of the step's time from the ranks' work and the allreduce of two, checked against steps in which ranks
    exchange gradients, and what it says of up to 1,024. With link, hosts are only checked against the model that an
    earlier call has fitted.
    """

    link: NonNegativeFloat = 0.0
    """Gbit/s of the hosts' links, where they bound the allreduce; 0: fit the model"""


class MemorySettings(StepSettings):
    """The proportional set size of 1 and of 4 ranks: pages that ranks share, as the packed images, count once."""


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
