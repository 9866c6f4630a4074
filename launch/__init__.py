"""What a person touches: the command line, recipes, and the starting of runs."""
