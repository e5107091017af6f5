"""What a verb can be told, by files, the environment and flags. Nothing here imports torch."""
