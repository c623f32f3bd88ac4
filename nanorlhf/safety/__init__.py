"""What keeps a run from losing work and from being wrong unnoticed."""
