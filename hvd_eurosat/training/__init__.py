"""The algorithm: step, gradients, optimiser, metrics, state and checkpoints. What people see of it is in run/."""
