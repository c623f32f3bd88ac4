"""One run in one folder: checkpoints, metrics, resuming, checks, findings."""
