"""Hostile shards, made from valid ones: each a pure function of a seeded generator.

Changes know the structure they break, so that what comes behind the first check is reached too: tar headers are changed
and their checksums made right again (pictures: pictures.py). Pictures, texts, names and archives are each left whole
most of the time, else nothing behind them would ever be read.
"""

from __future__ import annotations

import bz2
import functools
import gzip
import json
import lzma
import random
import struct
import tarfile

from treering.tests.fuzz.pictures import NUMBERS, damaged, picture

KEYS = (
    "../../x",
    "/etc/passwd",
    "/tmp/x",
    "..",
    ".",
    "",
    "/",
    "a/../../../x",
    "~/.ssh/x",
    "a\0b",
    "\0",
    "x" * 10_000,
    "é" * 5000,
    "a/" * 2000 + "b",
    "\x1b[2J",
    "a\nb",
    "\u202egnp",
    "\udcff\udc80",
    "C:\\x",
    "..\\..\\x",
    "-rf",
    "__meta",
    "a.b/c",
    "%2e%2e/x",
    "{a,b}",
    "*",
    "[0]",
    "<b>x</b>",
    "{{ 7 * 7 }}",
    "$HOME",
    "|id",
    "CON",
    "\ufeff",
    " ",
    "a ",
    "狗",
)
KINDS = ("npy", "clip.npy", "gif", "cls", "pyd", "pickle", "", "..", "json", "x" * 300, "\x1b", "png", "txt", "seg.png")
TEXTS = (
    b"",
    b" ",
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbfa",
    b"a\x00b",
    b"\xed\xa0\x80",
    "‮abc".encode(),
    b"<script>",
    b"&#x110000;&#0;&#xD800;",
    b"&" * 3000,
    "é".encode() * 9000,
    b"a" * 200_000,
    b"\xf0\x9f\x91\xa9\xe2\x80\x8d" * 800,
    b"<start_of_text><end_of_text>",
    "\u0301".encode() * 20_000,
    b"1" * 60_000,
    b"a\r\n" * 999,
    b"A" * 1_100_000,
    "ﬃ".encode() * 3000,
    "ﷺ".encode() * 3000,
    b"&amp;" * 5000,
    b"\xc3\xa2\xe2\x82\xac" * 2000,
    b"'s" * 20_000,
)
HEADERS = (
    "{'descr': '<f4', 'fortran_order': False, 'shape': (4,), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
    "{'descr': '<f8', 'fortran_order': True, 'shape': (1000000000000,)}",
    "{'descr': '<f4', 'shape': (-1,)}",
    "{'descr': [('a', '<f4', (99999, 99999))], 'fortran_order': False, 'shape': ()}",
    "__import__('os').getpid()",
    "{" * 5000,
    "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1," * 4000 + ")}",
    "(" * 9000,
    "",
    "\xff",
)


def shards(random: random.Random) -> dict[str, bytes]:
    """One to three files by name: tar shards, most of them with something wrong somewhere."""
    found = {}
    for i in range(random.choice((1, 1, 1, 2, 3))):
        data = shard(random, i)
        ending = "tar"
        if random.random() < 0.06:
            pack = random.choice((gzip.compress, gzip.compress, bz2.compress, lzma.compress))
            data, ending = pack(data), random.choice(("tar", "tar.gz"))
        elif random.random() < 0.01:
            data, ending = gzip_bomb(), "tar.gz"
        found[f"{i:02}.{ending}"] = damaged(random, data) if random.random() < 0.08 else data
    return found


@functools.cache
def gzip_bomb() -> bytes:
    """350 kB that become 80 MB."""
    return gzip.compress(bytes(80_000_000), 1)


def shard(random: random.Random, number: int) -> bytes:
    """A tar of a few samples. Every third has hostile headers, every eighth a hostile structure."""
    parts = []
    hostile = random.random() < 0.33
    for i in range(random.choice((0, 1, 2, 3, 5, 8))):
        key = random.choice(KEYS) if random.random() < 0.12 else f"{random.choice(('', 'a/', 'b/c/'))}{number}{i:03}"
        kinds = [random.choice(("jpg", "jpg", "jpeg", "png", "webp", "JPG")), random.choice(("txt", "txt", "json"))]
        kinds += random.sample(KINDS, random.choice((0, 0, 0, 1, 2)))
        parts += [member(random, f"{key}.{kind}", content(random, kind.lower()), hostile) for kind in kinds]
    if random.random() < 0.06:
        random.shuffle(parts)
    if random.random() < 0.06 and parts:
        parts.insert(random.randrange(len(parts)), random.choice((bytes(512), bytes(1024), random.randbytes(512))))
    end = bytes(1024) if random.random() < 0.96 else bytes(512 * random.choice((0, 1, 20)))
    return b"".join(parts) + end


def member(random: random.Random, name: str, data: bytes, hostile: bool) -> bytes:
    """A member with its headers."""
    blocks = data + bytes(-len(data) % 512)
    info = tarfile.TarInfo(name)
    info.size = len(data)
    format = random.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))
    try:
        header = info.tobuf(format, "utf-8", "surrogateescape")
    except (ValueError, UnicodeError):
        header = tarfile.TarInfo("x").tobuf()
    if hostile and random.random() < 0.2:
        header = header[:-512] + changed_header(random, header[-512:])
    if hostile and random.random() < 0.2:
        header = extended(random) + header
    return header + blocks


def changed_header(random: random.Random, header: bytes) -> bytes:
    """One field of a tar header changed; its checksum is right again, most of the time."""
    start, size = random.choice(
        (
            (0, 100),
            (100, 8),
            (124, 12),
            (124, 12),
            (124, 12),
            (136, 12),
            (156, 1),
            (156, 1),
            (157, 100),
            (257, 8),
            (345, 155),
        )
    )
    value = random.choice(
        (
            random.randbytes(size),
            bytes(size),
            b"7" * size,
            b"\xff" * size,
            b"\x80" + random.randbytes(size - 1),
            b"%0*o" % (size - 1, random.choice(NUMBERS)),
            b"-1",
            b" " * size,
            random.choice(b"0123456789gxLKSDVMN\0").to_bytes(1),
        )
    )
    header = bytearray(header)
    header[start : start + size] = value[:size].ljust(size, b"\0")
    if random.random() < 0.9:
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def extended(random: random.Random) -> bytes:
    """A pax or GNU header for the member behind it."""
    if random.random() < 0.4:
        kind, data = random.choice(b"LK").to_bytes(1), random.choice(KEYS).encode("utf-8", "surrogatepass") + b"\0"
    else:
        fields = {
            "path": random.choice(KEYS),
            "size": random.choice(("0", "-1", "9" * 30, "1e3", "512", "٣", "9" * 6000)),
            "linkpath": "/etc/passwd",
            "GNU.sparse.major": "1",
            "GNU.sparse.name": "../x",
            "hdrcharset": "BINARY",
            "mtime": "nan",
            "": "x",
            "x" * 2000: "y" * random.choice((1, 90_000)),
        }
        rows = [pax(name, fields[name]) for name in random.sample(sorted(fields), random.choice((1, 1, 2, 5)))]
        kind, data = random.choice((b"x", b"x", b"x", b"g", b"X")), b"".join(rows)
        if random.random() < 0.3:
            data = damaged(random, data)
        if random.random() < 0.05:
            data = b"".join(rows) * random.choice((100, 9000))
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = kind, len(data)
    return info.tobuf() + data + bytes(-len(data) % 512)


def pax(name: str, value: str) -> bytes:
    rest = f" {name}={value}\n".encode("utf-8", "surrogatepass")
    length = len(rest) + 1
    while len(str(length)) + len(rest) != length:
        length = len(str(length)) + len(rest)
    return b"%d" % length + rest


# Members


def content(random: random.Random, kind: str) -> bytes:
    """What a member of a kind may hold."""
    if kind == "txt":
        return random.choice(TEXTS) if random.random() < 0.25 else b"a picture of %d things" % random.randrange(99)
    if kind == "json":
        return metadata(random)
    if kind.endswith("npy"):
        header = random.choice(HEADERS).encode("latin-1")
        version = random.choice((b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\xff\xff"))
        length = struct.pack("<H", min(len(header), 0xFFFF)) if version[0] == 1 else struct.pack("<I", len(header))
        return b"\x93NUMPY" + version + length + header + random.randbytes(16)
    if kind in ("jpg", "jpeg", "png", "webp"):
        return picture(random)
    return random.randbytes(random.randrange(60))


def metadata(random: random.Random) -> bytes:
    """A sample's .json."""
    text = random.choice(TEXTS[:12]).decode("utf-8", "replace")
    good = {"captions": ["a", "b"], "caption": "c", "labels": {"x": "y"}, "similarity": 0.3, "url": "https://x.example"}
    if random.random() < 0.5:
        return json.dumps(good).encode()
    if random.random() < 0.5:
        values = (
            None,
            True,
            -1,
            1e308,
            10**400,
            "",
            text,
            [],
            [text],
            [1],
            {},
            {"a": text},
            [[]],
            ["a"] * 20_000,
            {str(i): "x" for i in range(20_000)},
            "\ud800",
            [{"text": "a", "source": "b", "weight": -1}],
        )
        return json.dumps({**good, random.choice((*good, text)): random.choice(values)}).encode()
    return random.choice(
        (
            b"[" * 100_000,
            b'{"a":' * 50_000,
            b"1" * 100_000,
            b"[" * 400_000 + b"]" * 400_000,
            b'"' + b"\\u0041" * 100_000 + b'"',
            b"NaN",
            b'{"similarity": NaN, "captions": ["x"]}',
            b"1e999999",
            b"-",
            b"",
            b"\xff",
            b"null",
            b'{"a": 1, "a": 2}',
            b'{"captions": ["\\ud83d", "\\udc4d"]}',
            b'{"\\u0000": 1}',
            b'{"captions": ["a", ' + b'"b", ' * 99_000 + b'"c"]}',
        )
    )
