"""One run in one folder: the lock, the signals, and what a resumed run must have in common."""
