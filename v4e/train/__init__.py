"""Training: players as engines, the loop, checkpoints. The only rooms that know DeepSpeed; none knows a recipe."""
