"""Reading and writing bytes anywhere fsspec reaches: reads with retries, caches on the node, atomic writes."""
