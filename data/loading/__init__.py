"""Batches of training samples, decoded by worker processes."""
