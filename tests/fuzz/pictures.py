"""Hostile pictures: valid ones with a change that knows the structure it breaks, each a pure function of a generator.

PNG chunks get their CRC after it, JPEG segments and WebP chunks their lengths, so that decoders read on.
"""

from __future__ import annotations

import functools
import io
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

NUMBERS = (0, 1, 2, 7, 8, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@functools.cache
def valid_pictures() -> tuple[bytes, ...]:
    """Small pictures of all formats and modes."""
    found = []
    pixels = np.random.default_rng(0).integers(0, 256, (21, 34, 4), dtype=np.uint8)
    whole = Image.fromarray(pixels, "RGBA")
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x"
    for mode in ("RGB", "L", "CMYK", "YCbCr"):
        for options in (
            {},
            {"progressive": True},
            {"exif": exif},
            {"restart_marker_blocks": 1},
            {"icc_profile": bytes(600)},
        ):
            found.append(saved(whole.convert("RGB").convert(mode), "JPEG", **options))
    for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"):
        image = whole.convert("L").convert(mode) if mode.startswith("I") else whole.convert(mode)
        found += [saved(image, "PNG"), saved(image, "PNG", exif=exif)]
    for options in ({}, {"lossless": True}, {"exif": exif}, {"save_all": True, "append_images": [whole] * 3}):
        found.append(saved(whole, "WEBP", **options))
        found.append(saved(whole.convert("RGB"), "WEBP", **options))
    found.append(saved(whole, "PNG", save_all=True, append_images=[whole] * 3))
    found += [saved(whole.convert("RGB"), kind) for kind in ("GIF", "BMP", "TIFF", "PPM", "JPEG2000", "ICO")]
    return tuple(found)


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def picture(random: random.Random) -> bytes:
    """A picture, half of the time a changed one."""
    data = random.choice(valid_pictures())
    if random.random() < 0.5:
        return data
    changes: list[Callable[..., bytes]] = [damaged]
    for start, change in ((b"\xff\xd8", changed_jpeg), (b"\x89PNG", changed_png), (b"RIFF", changed_webp)):
        changes += [change] * 3 if data.startswith(start) else []
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        data = small(random.choice(changes)(random, data))
    return data


def small(data: bytes) -> bytes:
    """Not more than 8 MB of it: large files are slow, not hostile."""
    return data[: 8 << 20]


def damaged(random: random.Random, data: bytes) -> bytes:
    """Bytes with something changed that knows nothing of their structure."""
    if not data:
        return b"\xff"
    data = bytearray(data)
    at = random.randrange(len(data))
    match random.randrange(7):
        case 0:
            for _ in range(random.choice((1, 1, 3, 20))):
                data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        case 1:
            del data[at:]
        case 2:
            data[at:at] = random.randbytes(random.choice((1, 4, 512, 9000)))
        case 3:
            data[at:at] = data[at : at + random.choice((1, 16, 512, 5000))]
        case 4:
            del data[at : at + random.choice((1, 4, 512))]
        case 5:
            number, order = random.choice(NUMBERS), random.choice("<>")
            data[at : at + 4] = struct.pack(f"{order}I", number)
        case 6:
            data += random.randbytes(random.choice((1, 600)))
    return bytes(data)


@functools.cache
def bombs() -> tuple[bytes, bytes]:
    """A little and much that compresses to nearly nothing."""
    return zlib.compress(bytes(100_000)), zlib.compress(bytes(40_000_000), 1)


def changed_png(random: random.Random, data: bytes) -> bytes:
    """A PNG whose chunks are changed, with their lengths and checksums right."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    bomb = random.choice(bombs())
    match random.randrange(6):
        case 0 if chunks and len(chunks[0][1]) == 13:
            fields = list(struct.unpack(">IIBBBBB", chunks[0][1]))
            i = random.randrange(7)
            fields[i] = random.choice(NUMBERS) if i < 2 else random.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
            chunks[0] = (b"IHDR", struct.pack(">IIBBBBB", *fields))
        case 1:
            new = random.choice(
                (
                    (b"zTXt", b"k\0\0" + bomb),
                    (b"iTXt", b"k\0\1\0\0\0" + bomb),
                    (b"iCCP", b"k\0\0" + bomb),
                    (b"tEXt", b"k\0" + bytes(3_000_000)),
                    (b"eXIf", random.randbytes(99)),
                    (b"tRNS", b"\0"),
                    (b"PLTE", random.randbytes(7)),
                    (b"acTL", struct.pack(">II", 1 << 31, 0)),
                    (b"gAMA", bytes(4)),
                    (b"pHYs", b""),
                    (b"IDAT", bomb),
                    (b"\0\0\0\0", b""),
                )
            )
            chunks.insert(random.randrange(1, len(chunks) + 1), new)
        case 2 if len(chunks) > 2:
            del chunks[random.randrange(1, len(chunks))]
        case 3 if chunks:
            chunks *= random.choice((2, 50))
        case 4 if chunks:
            i = random.randrange(len(chunks))
            chunks[i] = (chunks[i][0], damaged(random, chunks[i][1]))
        case _:
            random.shuffle(chunks)
    return data[:8] + b"".join(
        struct.pack(">I", len(own)) + kind + own + struct.pack(">I", zlib.crc32(kind + own)) for kind, own in chunks
    )


def changed_jpeg(random: random.Random, data: bytes) -> bytes:
    """A JPEG whose segments are changed, with their lengths right; or with thousands of scans."""
    segments, at = [], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        length = struct.unpack(">H", data[at + 2 : at + 4])[0]
        segments.append((data[at + 1], bytearray(data[at + 4 : at + 2 + length])))
        at += 2 + length
    rest = data[at:]
    frames = [own for marker, own in segments if 0xC0 <= marker <= 0xC2 and len(own) > 5]
    match random.randrange(6):
        case 0 if frames:
            frames[0][1:5] = struct.pack(">HH", *random.choices((0, 1, 8, 700, 8000, 0x7FFF, 0xFFFF), k=2))
        case 1 if frames:
            own = frames[0]
            own[random.randrange(len(own))] = random.choice((0, 1, 4, 16, 255))
        case 2:
            exif = (
                b"Exif\0\0"
                + random.choice((b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b""))
                + random.choice(
                    (
                        struct.pack("<HHHII", 1, 0x0112, 3, 1, random.choice(NUMBERS)),
                        random.randbytes(60),
                        struct.pack("<HHHII", 1, 0x8769, 4, 1, 8),
                        struct.pack("<HHHII", 0xFFFF, 0x0112, 5, 0x7FFFFFFF, 8),
                    )
                )
            )
            segments.insert(0, (0xE1, bytearray(exif)))
        case 3 if segments:
            own = random.choice(segments)[1]
            own[:] = damaged(random, bytes(own))[:65_000]
        case 4:
            scan = rest.removesuffix(b"\xff\xd9")
            rest = scan[:14] * random.choice((10, 3000)) + rest
            if frames and random.random() < 0.5:  # each scan goes over the whole picture
                side = random.choice((900, 900, 900, 8000))
                frames[0][1:5] = struct.pack(">HH", side, side)
        case _:
            segments = segments * random.choice((2, 300)) if random.random() < 0.5 else segments[::-1]
    parts = [bytes((0xFF, marker)) + struct.pack(">H", len(own) + 2) + own for marker, own in segments]
    return data[:2] + b"".join(parts) + rest


def changed_webp(random: random.Random, data: bytes) -> bytes:
    """A WebP whose chunks are changed, with their lengths right."""
    chunks, at = [], 12
    while at + 8 <= len(data):
        (length,) = struct.unpack("<I", data[at + 4 : at + 8])
        chunks.append((data[at : at + 4], data[at + 8 : at + 8 + length]))
        at += 8 + length + length % 2
    match random.randrange(4):
        case 0 if chunks:
            i = random.randrange(len(chunks))
            chunks[i] = (chunks[i][0], damaged(random, chunks[i][1]))
        case 1:
            size = random.choice((b"\0\0\0\0\0\0", b"\xff\xff\xff\xff\xff\xff", b"\xff\x1f\0\xff\x1f\0"))
            chunks.insert(0, (b"VP8X", random.randbytes(1) + bytes(3) + size))
        case 2 if chunks:
            chunks = chunks * random.choice((2, 500)) if random.random() < 0.5 else chunks[::-1]
        case _:
            chunks.insert(
                random.randrange(len(chunks) + 1),
                (
                    random.choice((b"EXIF", b"ICCP", b"ANIM", b"ANMF", b"ALPH")),
                    random.randbytes(random.choice((0, 6, 16, 400))),
                ),
            )
    body = b"".join(kind + struct.pack("<I", len(own)) + own + bytes(len(own) % 2) for kind, own in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body
