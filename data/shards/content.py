"""What the samples of a shard are: a digest of them, taken by the walk that indexes the shard, and a check of a
member's header when its bytes are read.

The idea: both cost next to nothing. The walk reads a block of the file around each header anyway, in which the end of
the member before and the start of the member after lie; the header lies just before the bytes that a sample is read
from. So the digest covers names, sizes, texts and both ends of every other member, but not the middle of a picture; and
it does not depend on where the shard is, nor on its format.
"""

from __future__ import annotations

import tarfile
from hashlib import blake2b
from typing import BinaryIO

BLOCK = 512  # bytes of a header, which ends where the member's data begins
DIGEST = 16  # bytes
_END = 1024  # bytes at either end of a member
_TEXTS = (".txt", ".json", ".cls")
_LONGEST_TEXT = 1 << 20  # bytes up to which all of a text is read
_REGULAR = frozenset((b"0", b"\0", b"7"))
_LONGEST_NAME = 100  # bytes that a header has for a name; longer ones stand in an extended header before it


class ContentDigest:
    """The digest of the members of a shard, added in their order."""

    def __init__(self) -> None:
        self._hash = blake2b(digest_size=DIGEST)

    def add(self, file: BinaryIO, name: str, offset: int, size: int) -> None:
        """Adds the member with `size` bytes of data at byte `offset` of the tar opened as `file`."""
        encoded = name.encode("utf-8", "surrogateescape")
        self._hash.update(b"%d %d " % (len(encoded), size) + encoded)
        file.seek(offset)
        whole = size <= (_LONGEST_TEXT if name.lower().endswith(_TEXTS) else 2 * _END)
        self._hash.update(file.read(size if whole else _END))
        if not whole:
            file.seek(offset + size - _END)
            self._hash.update(file.read(_END))

    def hex(self) -> str:
        """The digest in hexadecimal digits."""
        return self._hash.hexdigest()


def is_header_of(header: bytes, key: str, kind: str, size: int) -> bool:
    """Whether a tar header is that of the member `kind` of sample `key`, with `size` bytes of data."""
    name, own = header[:_LONGEST_NAME].partition(b"\0")[0], key.encode("utf-8", "surrogateescape")
    try:
        same = int(header[124:136].strip(b" \0"), 8) == size and header[156:157] in _REGULAR
    except ValueError:
        same = False
    if same and name.startswith(own) and name[len(own) :].lower() == b"." + kind.encode("utf-8", "surrogateescape"):
        return True
    try:
        found = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    if found.size != size or found.type not in _REGULAR:
        return False
    if len(own) + 1 + len(kind) > _LONGEST_NAME or not f"{key}{kind}".isascii():
        return True  # the name may stand in an extended header, and what stands here is then up to the writer
    return found.name.startswith(key) and found.name[len(key) :].lower() == f".{kind}"
