"""Objectives: named, weighted terms of the loss.

An objective is a function of one forward pass that returns *this rank's share* of its global mean: the shares of all
ranks sum to the loss of the global batch, so gradients are summed over ranks and the result does not depend on how many
there are.
"""
