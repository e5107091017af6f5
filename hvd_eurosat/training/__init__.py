"""Optimiser, step, checkpoint, metrics and the files of a run."""
