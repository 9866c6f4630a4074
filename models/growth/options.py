"""What a stage may choose about its growth; the operators take these words, and a recipe is checked against them."""

from __future__ import annotations

from typing import Literal

WidthInit = Literal["noise", "duplicate", "lemon"]
"""new channels, heads and hidden units: copies with noise that sums to zero, plain copies, or LEMON's projection"""
DepthInit = Literal["zero", "stack", "interleave"]
"""new blocks: copies with zero outputs, which keep the function, or copies as they are, which do not"""
DropBlocks = Literal["last", "smallest"]
"""blocks that are removed when a depth shrinks: the last, or those with the smallest output projections"""
InheritFrom = float | Literal["ema"]
"""the fraction of the inherited weights, the rest being freshly initialised; or new parts from the running average"""
