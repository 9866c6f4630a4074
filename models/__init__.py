"""What is trained: specs, towers, the captioner, and the operators that grow them.

Nothing here knows of data sets, runs or processes; `spec` and `flops` do not even need torch.
"""
