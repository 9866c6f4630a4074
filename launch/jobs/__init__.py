"""Runs under Slurm: submit, start on each node, stop and continue them."""
