"""The commands of `python -m nanorlhf`, one file each."""
