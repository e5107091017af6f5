"""Weights in and out: Keras, HDF5, safetensors, ONNX, state dicts. Nothing here trains."""
