"""Decoding one sample: from a shard's raw bytes to pixels, tokens, boxes and arrays."""
