"""Scenes in, maps out: the room that imports rasterio, beside data/multispectral.py. Nothing here changes a weight."""
