"""Data sets that come with the package, by name as in samples://emoji."""
