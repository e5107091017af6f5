"""What a run leaves and shows: its directory, logs, pictures, words. Nothing here changes a weight."""
