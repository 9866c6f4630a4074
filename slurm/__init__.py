"""The template of the batch script for runs under Slurm."""
