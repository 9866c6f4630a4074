"""The batch template of a run under Slurm, and a real Slurm cluster on one machine to try it on."""
