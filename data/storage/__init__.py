"""Bytes from and to anywhere fsspec reaches: reading with retries, caches on the node, whole files written at once."""
