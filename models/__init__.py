"""The models: specs, their parts, the modules built from them, growth, and the interchange with open_clip.

Nothing here knows of data sets, runs or processes. `spec`, `parts`, `flops` and `activations` do not need torch.
"""
