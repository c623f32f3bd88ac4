"""What surrounds a run in its folder: checkpoints, metrics, resuming, checks before, findings."""
