"""Serialises tensors into the bytes of one safetensors file, copying each tensor once, straight to its place.

`safetensors.torch.save` was tried: it copies every tensor twice more. A snapshot is a copy anyway, so it is taken in
the form in which it is uploaded. The format: 8 bytes with the length of a JSON header, the header (dtype, shape and
place of each tensor), the tensors without gaps. https://huggingface.co/docs/safetensors#format
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


_uninitialised = ctypes.pythonapi.PyByteArray_FromStringAndSize
_uninitialised.restype, _uninitialised.argtypes = ctypes.py_object, [ctypes.c_char_p, ctypes.c_ssize_t]
"""An uninitialised bytearray: `bytearray(n)` would touch new memory twice, which takes as long as the copy itself. It
has to be a bytearray, since the S3 client accepts only bytes, bytearray, str or a file."""


class SerializedPart:
    """One file in host memory; pinned if its tensors are on a GPU, and then complete after `torch.cuda.synchronize`."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        # Wide dtypes first, so that each tensor is aligned to its element size whatever dtypes are mixed.
        names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
        places, end = {}, 0
        for name in names:
            places[name] = (end, end + tensors[name].nbytes)
            end += tensors[name].nbytes
        entries = {
            name: {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": places[name]}
            for name, t in ((name, tensors[name]) for name in names)
        }
        text = json.dumps(entries, separators=(",", ":")).encode()
        head = text + b" " * (-len(text) % 8)
        start = 8 + len(head)
        self.size = start + end
        """size of the file in bytes"""
        self._pinned: Tensor | None = None
        if any(t.is_cuda for t in tensors.values()):
            self._pinned = whole = torch.empty(self.size, dtype=torch.uint8, pin_memory=True)
        else:
            self._bytes: bytearray = _uninitialised(None, self.size)
            whole = torch.frombuffer(self._bytes, dtype=torch.uint8)
        whole[:start] = torch.frombuffer(bytearray(len(head).to_bytes(8, "little") + head), dtype=torch.uint8)
        for name, (first, last) in places.items():
            if last > first:
                own = tensors[name].detach()
                whole[start + first : start + last].view(own.dtype).view(own.shape).copy_(own, non_blocking=True)

    def data(self) -> bytearray:
        """The bytes of the file."""
        return self._bytes if self._pinned is None else bytearray(self._pinned.numpy())
