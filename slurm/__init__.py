"""The batch template of a run under Slurm."""
