"""Processes, devices and files. Nothing here knows of language models or of RLHF."""
