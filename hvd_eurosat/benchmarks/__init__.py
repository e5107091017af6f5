"""What `benchmark` measures, each contender in jobs of its own."""
