"""Tar shards: listing a source's shards, indexing their members, filtering their samples, and writing them."""
