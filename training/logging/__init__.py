"""What a run records and shows: metrics.jsonl, TensorBoard, the terminal, profiles."""
