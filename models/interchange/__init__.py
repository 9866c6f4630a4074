"""Interchange with open_clip: its architectures as our specs, its state dicts as our tensors, both ways.

`architectures.py` goes between a config of theirs and a spec of ours and says which of their list is claimed, with the
reason for every other; `weights.py` goes between the tensors; `files.py` reads their files and knows their published
weights. Nothing here imports open_clip, which takes seconds: what is needed of it are files beside its code.
"""
