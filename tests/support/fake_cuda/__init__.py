"""A CUDA device that holds nothing: whole training steps run on it, on a machine without a GPU.

Tensors claim to be on a GPU and have no numbers (torch's FakeTensorMode); tensors of the host are real. So a step finds
operands on different devices, and whoever has to know a number of the device on the host: each a wait on a real GPU.
What a step asks of the device is counted: calls that launch kernels, bytes read and written, FLOPs by dtype,
collectives. It does not find what kernels compute, nor how long they take.

`loading` comes first in a process, as torch asks only once whether there is CUDA.
"""
