"""Scenes in, maps out: the only room that imports rasterio. Nothing here changes a weight."""
