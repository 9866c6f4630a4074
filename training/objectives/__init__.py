"""Objectives: named, weighted terms of the loss.

An objective is a function of one forward pass. It returns *this rank's part* of its mean over the global batch: the
parts of all ranks sum to the loss of the global batch. Gradients are therefore summed over ranks, and the result does
not depend on the number of ranks.
"""
