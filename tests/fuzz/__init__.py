"""Fuzzing: hostile shards against everything that reads them. `python -m tests.fuzz.shards --minutes 10`."""
