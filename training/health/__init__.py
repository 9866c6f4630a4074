"""Ends a run, or takes it back: hangs, signals, divergence."""
