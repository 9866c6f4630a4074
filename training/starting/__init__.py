"""How a run begins: from its newest commit, from another run, from imported weights, or again after bad steps."""
