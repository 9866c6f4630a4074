"""Commits: the whole state of a run in a store, all or nothing."""
