"""Tests, mirroring the packages; benchmarks run as `python -m tests.benchmarks.NAME`."""
