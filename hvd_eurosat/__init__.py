"""Distributed training of land-cover classifiers on Sentinel-2 patches, with Horovod and MPI."""

__version__ = "0.1.0"
