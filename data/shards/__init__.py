"""Tar shards: which a source has, what lies where in them, which samples a filter accepts; and writing them."""
