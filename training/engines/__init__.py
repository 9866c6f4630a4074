"""Engines: DDP, FSDP2 or DeepSpeed behind one interface, with the same gradients from each."""
