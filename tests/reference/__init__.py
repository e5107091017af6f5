"""The plain algorithm, written a second time and on its own, as a measure for the product.

schedule, augmentation, optimisers and trainer are the reference: one process, one image at a time, torch's own
DistributedSampler and optimisers, torchvision's network, ranks that take turns. They import of the package its
configuration alone. product runs the package's own training loop on the same case, cases draws cases and compares.

    python -m tests.reference --examples 500 --seed 1
"""
