"""Scenes in, maps out. Nothing here changes a weight."""
