"""Processes, devices, files: nothing about language models inside."""
