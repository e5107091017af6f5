"""The ranks of a job, and the nodes they run on. No other room imports Horovod or mpi4py; this one knows no data."""
