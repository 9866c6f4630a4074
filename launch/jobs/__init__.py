"""Runs under Slurm: submitting, starting on each node, stopping and continuing them."""
