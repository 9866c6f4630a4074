"""Growing a model during training or between runs: when to grow, to which sizes, and how its state is mapped."""
