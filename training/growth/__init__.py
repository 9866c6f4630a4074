"""Growing a model while it trains, or between runs: when, into what, and how its state follows."""
