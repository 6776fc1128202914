"""A profile becomes a plan; numpy and scipy only."""
