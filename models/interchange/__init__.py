"""Interchange with open_clip: its architectures as specs, its state dicts as our tensors, in both directions.

`architectures.py` converts between configs and specs and says which of open_clip's architectures are supported, with
the reason for every other; `weights.py` converts tensors; `files.py` reads files and knows the published weights.
Nothing here imports open_clip, which takes seconds: only data files beside its code are read.
"""
