"""The records and displays of a run: metrics.jsonl, TensorBoard, the terminal, profiles."""
