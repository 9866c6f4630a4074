"""Batches of training samples, decoded by processes beside the training process."""
