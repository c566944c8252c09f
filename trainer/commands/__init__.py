"""The commands of `python -m trainer`, one a file: each puts together what was typed, data, run, work and report."""
