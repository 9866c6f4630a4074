"""What a picture's file says before it is decoded: bounds on its pixels, parts and scans, checked before anything is
allocated; and the file without metadata, for decoders that fail at them.

The one idea: a file is walked from part to part (JPEG: ITU T.81 annex B; PNG: segments of ISO 15948; WebP: RIFF) in a
bounded number of steps, without looking inside the parts. A picture that would take seconds or a gigabyte is refused by
these few bytes.
"""

from __future__ import annotations

import re
import struct

from ..errors import BadSample

MOST_PIXELS = 1 << 26  # 8192 x 8192; a larger picture is a decompression bomb or not a photo
MOST_SCANS = 100  # of a JPEG; encoders write about a dozen, and decoding each covers the whole picture
_MOST_SCANNED = 16 * MOST_PIXELS  # pixels in all scans
_MOST_PARTS = 5_000  # segments before the first scan, or chunks of metadata; photos have a few dozen
_MOST_FILL = 1 << 16  # bytes between segments
_UNCHECKED_PIXELS, _PIXELS_PER_BYTE = 1 << 22, 10_000  # a blank page of one bit a pixel takes 8,256 pixels a byte
_PNG = b"\x89PNG\r\n\x1a\n"
_SCAN = b"\xff\xda"  # starts a scan and occurs nowhere else in a frame: in data, 0xff is followed by zero
_FRAMES = frozenset((*range(0xC0, 0xD0),)) - {0xC4, 0xC8, 0xCC}
_FAST_FRAMES = (0xC0, 0xC2)  # baseline and progressive
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
# Tables, comments, JFIF (APP0), colour profile (APP2), picture editors (APP12 to 14): none sets the orientation.
_PLAIN_SEGMENTS = frozenset((0xC4, 0xDB, 0xDD, 0xFE, 0xE0, 0xE2, 0xEC, 0xED, 0xEE))
_WITHOUT_LENGTH = frozenset((0x00, 0x01, *range(0xD0, 0xD9)))
_METADATA = frozenset(
    (0xFE, *range(0xE2, 0xEE), 0xEF)
)  # comments, and all APP segments but 0, 1 (EXIF) and 14 (colours)
_CHUNKS = frozenset((b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"eXIf"))  # of a PNG, all that matters here
_FILL = re.compile(rb"\xff+")


def check_header(data: bytes) -> bool:
    """Raises BadSample if a JPEG, PNG or WebP has too many pixels, parts or scans. Returns whether it is a colour JPEG
    without metadata that could rotate it, which a fast decoder may read."""
    if data[:2] == b"\xff\xd8":
        return _check_jpeg(data)
    if data[:8] == _PNG and data[12:16] == b"IHDR" and len(data) >= 24:
        width, height = struct.unpack_from(">II", data, 16)
        _check_size(width, height, data)
        _check_chunks(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) >= 30:
        width, height = _webp_size(data)
        _check_size(width, height, data)
    return False


def without_metadata(data: bytes) -> bytes | None:
    """A JPEG or PNG without comments, colour profiles and texts, but with its orientation; None for other files."""
    if data[:8] == _PNG:
        parts, at = [_PNG], 8
        while at + 12 <= len(data):
            end = at + 12 + int.from_bytes(data[at : at + 4], "big")
            if data[at + 4 : at + 8] in _CHUNKS:
                parts.append(data[at:end])
            at = end
        return b"".join(parts)
    if data[:2] != b"\xff\xd8":
        return None
    parts, at = [data[:2]], 2
    while at + 4 <= len(data) and data[at : at + 2] != _SCAN:
        marker, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at] != 0xFF or marker == 0xFF or marker in _WITHOUT_LENGTH:
            at += 1
            continue
        if marker not in _METADATA:
            parts.append(data[at:end])
        at = end
    return b"".join([*parts, data[at:]])


def has_all_scans(data: bytes) -> bool:
    """Whether the scans of a JPEG bring every coefficient of every component to its full precision (T.81, annex G)."""
    found = _first_scan(data)
    if found is None:
        return False
    at, channels, progressive = found
    whole: dict[int, set[int]] = {}
    while at >= 0:
        count = data[at + 4] if at + 4 < len(data) else 0
        end = at + 5 + 2 * count
        if end + 3 > len(data):
            break
        first, last, bits = data[end : end + 3] if progressive else (0, 63, 0)
        for component in data[at + 5 : end : 2] if bits & 15 == 0 else b"":
            whole.setdefault(component, set()).update(range(first, last + 1))
        at = data.find(_SCAN, end)
    return len(whole) == channels and all(len(coefficients) == 64 for coefficients in whole.values())


def _check_size(width: int, height: int, data: bytes) -> None:
    pixels = width * height
    if pixels > MOST_PIXELS:
        raise BadSample(f"picture too large: {width} x {height} pixels")
    if pixels > max(_UNCHECKED_PIXELS, _PIXELS_PER_BYTE * len(data)):
        raise BadSample(f"picture too large: {width} x {height} pixels in {len(data):,} bytes, a decompression bomb")


def _check_jpeg(data: bytes) -> bool:
    at, fill, plain, end = 2, 0, True, len(data) - 9
    frame: tuple[int, int, int, int] | None = None  # marker, height, width, channels
    for _ in range(_MOST_PARTS):
        if not 0 <= at < end:
            return False
        marker = data[at + 1]
        if data[at] != 0xFF or marker == 0xFF:  # bytes that belong to no segment: decoders skip them one by one
            begin, plain = at, False
            at = _FILL.match(data, at).end() - 1 if data[at] == 0xFF else data.find(b"\xff", at)  # type: ignore[union-attr]
            fill += at - begin
            if fill > _MOST_FILL:
                raise BadSample(f"picture too slow: more than {_MOST_FILL:,} bytes between its segments")
            continue
        if marker == 0xDA:
            return _check_scans(data, at, frame) and plain
        if marker in _WITHOUT_LENGTH:
            at, plain = at + 2, False
            continue
        if frame is None:
            if marker in _FRAMES:
                _, height, width, channels = struct.unpack_from(">BHHB", data, at + 4)
                frame = (marker, height, width, channels)
                _check_size(width, height, data)
            elif marker not in _PLAIN_SEGMENTS:
                plain = False
        at += max(4, 2 + (data[at + 2] << 8 | data[at + 3]))
    raise BadSample(f"picture too slow: more than {_MOST_PARTS:,} segments before its first scan")


def _check_scans(data: bytes, at: int, frame: tuple[int, int, int, int] | None) -> bool:
    """Raises BadSample if the scans from `at` on are too many for the size of the picture. Returns whether it is a
    picture in three channels."""
    if frame is None:
        return False
    marker, height, width, channels = frame
    if marker == 0xC2 or data[at + 4] < channels:  # several scans, each over the whole picture
        scans = data.count(_SCAN, at)
        if scans > MOST_SCANS or scans * height * width > _MOST_SCANNED:
            raise BadSample(f"picture too slow: {scans:,} scans of {width} x {height} pixels")
    return marker in _FAST_FRAMES and channels == 3 and height * width > 0


def _first_scan(data: bytes) -> tuple[int, int, bool] | None:
    """Where the first scan of a JPEG starts, the number of components, and whether it is progressive."""
    at, frame = 2, None
    while at + 9 < len(data) and data[at] == 0xFF:
        if data[at + 1] == 0xDA:
            return None if frame is None else (at, *frame)
        if data[at + 1] in _FRAMES:
            frame = (data[at + 9], data[at + 1] in _PROGRESSIVE)
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _check_chunks(data: bytes) -> None:
    at, chunks, most = 8, 0, _MOST_PARTS + len(data) // 1024  # encoders write pixels in chunks of 8 kB or more
    while len(data) > 12 * _MOST_PARTS and at + 12 <= len(data):
        at += 12 + int.from_bytes(data[at : at + 4], "big")
        chunks += 1
        if chunks > most:
            raise BadSample(f"picture too slow: more than {most:,} chunks in {len(data):,} bytes")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height in the header of a WebP (RFC 9649)."""
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack_from("<HH", data, 26)
    return (width & 0x3FFF, height & 0x3FFF) if kind == b"VP8 " else (0, 0)
