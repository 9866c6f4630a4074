"""Decoding against Pillow's own pixels and formulas written out; and what must be refused."""

from __future__ import annotations

import io
import json
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from treering.data.config import AugmentConfig
from treering.data.errors import BadSample
from treering.data.samples import decode
from treering.data.samples.decode import captions_and_labels, centre_crop, decode_image, picture, random_crop, resized
from treering.tests.support.needs import missing

RGB = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
SMOOTH = np.asarray(Image.fromarray(RGB).resize((130, 90), Image.Resampling.BICUBIC))
NO_CROP = AugmentConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_rgb(kind: str, options: dict[str, Any]) -> None:
    assert np.array_equal(decode_image(encoded(Image.fromarray(RGB), kind, **options)), RGB)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg(subsampling: int, progressive: bool) -> None:
    data = encoded(Image.fromarray(SMOOTH), "JPEG", quality=90, subsampling=subsampling, progressive=progressive)
    theirs = np.asarray(Image.open(io.BytesIO(data))).astype(int)
    assert np.abs(decode_image(data) - theirs).max() <= 2  # two builds of libjpeg-turbo


def test_grey_and_palette() -> None:
    grey = Image.fromarray(RGB[..., 0])
    assert np.array_equal(decode_image(encoded(grey, "PNG")), np.repeat(RGB[..., :1], 3, 2))
    bits = grey.convert("1")
    assert np.array_equal(decode_image(encoded(bits, "PNG")), np.asarray(bits)[..., None].repeat(3, 2) * np.uint8(255))
    palette = Image.fromarray(RGB).convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    assert np.array_equal(decode_image(encoded(palette, "PNG")), np.asarray(palette.convert("RGB")))
    jpeg = encoded(Image.fromarray(SMOOTH[..., 0]), "JPEG")
    assert np.array_equal(decode_image(jpeg), np.asarray(Image.open(io.BytesIO(jpeg)))[..., None].repeat(3, 2))


def test_sixteen_bits_keep_their_range() -> None:
    deep = np.arange(0, 65536, 511, dtype=np.uint16)[None].repeat(3, 0)
    pixels = decode_image(encoded(Image.fromarray(deep), "PNG"))
    assert np.array_equal(pixels[..., 1], np.round(deep / 65535 * 255).astype(np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_lies_on_white(kind: str) -> None:
    alpha = np.random.default_rng(1).integers(0, 256, RGB.shape[:2], dtype=np.uint8)
    rgba = Image.fromarray(np.dstack([RGB, alpha]))
    a = alpha[..., None] / 255
    expected = RGB * a + 255 * (1 - a)
    pixels = decode_image(encoded(rgba, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {})))
    assert np.abs(pixels - expected).max() <= 1


def test_transparent_palette_and_colour_key() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putdata([0, 1])
    assert decode_image(encoded(palette, "PNG", transparency=0)).tolist() == [[[255, 255, 255], [0, 0, 255]]]
    key = Image.new("RGB", (2, 1))
    key.putdata([(9, 8, 7), (1, 2, 3)])
    assert decode_image(encoded(key, "PNG", transparency=(9, 8, 7))).tolist() == [[[255, 255, 255], [1, 2, 3]]]


def test_cmyk_jpeg() -> None:
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan, all magenta and yellow: red
    pixel = decode_image(encoded(cmyk, "JPEG", quality=95))[8, 8]
    assert np.abs(pixel.astype(int) - [255, 0, 0]).max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_exif_orientation(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(SMOOTH), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert expected.shape == ((90, 130, 3) if orientation < 5 else (130, 90, 3))
    assert np.abs(decode_image(data) - expected.astype(int)).max() <= 2


def png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG by hand: Pillow writes no 16-bit colours. PNG specification, section 11."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png_header(width: int, height: int) -> bytes:
    return png(width, height, 8, 2, bytes(1000))


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_of_every_kind(colour: int, channels: int) -> None:
    """Grey, RGB, grey with alpha and RGB with alpha, against the formulas of the PNG specification."""
    deep = np.random.default_rng(3).integers(0, 1 << 16, (5, 7, channels))
    data = png(7, 5, 16, colour, b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep))
    share = deep / 65535
    shown = share[..., :3] if channels > 2 else share[..., :1].repeat(3, 2)
    if channels in (2, 4):
        alpha = share[..., -1:]
        shown = shown * alpha + 1 - alpha
    assert np.abs(decode_image(data) - 255 * shown).max() <= (0.51 if colour == 0 else 2)  # of colours: the high byte


@pytest.mark.parametrize("bits", [1, 8, 16])
def test_a_transparent_grey_lies_on_white(bits: int) -> None:
    values = np.random.default_rng(4).integers(0, 2, (6, 9)) * np.array({1: 1, 8: 200, 16: 40_000}[bits])
    values[0, 0] = 0
    grey = Image.fromarray(values.astype({1: bool, 8: np.uint8, 16: np.uint16}[bits]))
    expected = np.where(values == 0, 255, {1: 255, 8: 200, 16: 156}[bits])
    pixels = decode_image(encoded(grey, "PNG", transparency=0))
    assert np.array_equal(pixels, expected[..., None].repeat(3, 2))


def test_grey_with_alpha_and_graded_palette() -> None:
    grey, alpha = RGB[..., 0], RGB[..., 1]
    expected = (grey * (alpha / 255.0) + 255 - alpha)[..., None]
    both = Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))
    assert np.abs(decode_image(encoded(both, "PNG")) - expected).max() <= 1
    palette = Image.new("P", (3, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255, 0, 255, 0])
    palette.putdata([0, 1, 2])
    pixels = decode_image(encoded(palette, "PNG", transparency=bytes([0, 128, 255])))
    assert pixels.tolist() == [[[255, 255, 255], [127, 127, 255], [0, 255, 0]]]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "MPO"])
def test_of_several_frames_the_first(kind: str) -> None:
    """Animations, and the two pictures that a phone's camera keeps in one JPEG."""
    frames = [Image.fromarray(SMOOTH), Image.new("RGB", (130, 90), "lime")]
    options: dict[str, Any] = {"PNG": {}, "WEBP": {"lossless": True}, "MPO": {"quality": 95}}[kind]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 2
    difference = np.abs(decode_image(data).astype(int) - SMOOTH)
    assert difference.max() == 0 if kind != "MPO" else difference.mean() < 8


def test_cmyk_by_the_formula() -> None:
    """CMYK JPEGs hold inverted inks, whether or not Adobe's marker says so: light is what no ink takes away."""
    inks = np.random.default_rng(5).integers(0, 256, (2, 2, 4), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    image = Image.fromarray(inks, "CMYK")
    data = encoded(image, "JPEG", quality=100, subsampling=0)
    light = (255 - inks[..., :3].astype(float)) * (255 - inks[..., 3:]) / 255
    assert b"Adobe" in data
    assert np.abs(decode_image(data) - light).max() <= 6
    at = data.index(b"\xff\xee")
    plain = data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]
    assert np.abs(decode_image(plain) - light).max() <= 6


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_same_with_and_without_simplejpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole or damaged: the same ones are refused, and the pixels are the same."""
    if decode.simplejpeg is None:
        missing("simplejpeg is not installed")
    random = np.random.default_rng(6)
    wholes = [
        encoded(Image.fromarray(SMOOTH), "JPEG", quality=90, subsampling=s, progressive=p)
        for s in (0, 1, 2)
        for p in (False, True)
    ]
    counts = {True: 0, False: 0}
    for n in range(900):
        data = bytearray(wholes[n % 6])
        if n % 4 == 1:
            data = data[: random.integers(len(data))]
        elif n % 4 == 2:
            data[int(random.integers(len(data)))] = int(random.integers(256))
        elif n % 4 == 3:
            at = int(random.integers(len(data)))
            data[at:at] = random.bytes(int(random.integers(1, 9)))
        results = []
        for module in (decode.simplejpeg, None):
            with monkeypatch.context() as patch:
                patch.setattr(decode, "simplejpeg", module)
                try:
                    results.append(decode_image(bytes(data)))
                except BadSample as error:
                    results.append(str(error))
        ours, theirs = results
        counts[isinstance(ours, str)] += 1
        if isinstance(ours, str) or isinstance(theirs, str):
            assert ours == theirs
        else:
            assert np.abs(ours.astype(int) - theirs).max() <= 2  # two builds of libjpeg-turbo
    assert min(counts.values()) > 200


WHOLE = encoded(Image.fromarray(SMOOTH), "JPEG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "neither JPEG, PNG nor WebP"),
        (b"GIF89a" + bytes(50), "neither JPEG, PNG nor WebP"),
        (encoded(Image.fromarray(RGB), "BMP"), "neither JPEG, PNG nor WebP"),
        (WHOLE[: len(WHOLE) // 2], "does not decode"),
        (WHOLE[:200], "does not decode"),
        (encoded(Image.fromarray(RGB), "PNG")[:-40], "does not decode"),
        (png_header(9000, 9000), "too large: 9000 x 9000 pixels"),
        (png_header(50_000, 50_000), "too large"),
        (png_header(8, 2), "does not decode|^$"),
    ],
)
def test_refused(data: bytes, reason: str) -> None:
    if reason.endswith("^$"):
        decode_image(data + b"")  # a good small PNG made the same way: it is the size that is refused above
        return
    with pytest.raises(BadSample, match=reason):
        decode_image(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # decode.py has it so, pytest undoes it
@given(
    st.binary(max_size=300),
    st.sampled_from([WHOLE, encoded(Image.fromarray(RGB), "PNG"), encoded(Image.fromarray(RGB), "WEBP")]),
    st.data(),
)
@settings(max_examples=300, deadline=None)
def test_hostile_bytes_are_bad_samples(noise: bytes, whole: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(whole)))
    try:
        pixels = decode_image(whole[:at] + noise + whole[at + len(noise) :])
    except BadSample:
        pass
    else:
        assert pixels.dtype == np.uint8
        assert pixels.shape[2] == 3


def test_picture_prefers_no_kind_and_names_what_it_found() -> None:
    data = encoded(Image.fromarray(RGB), "PNG")
    assert np.array_equal(picture({"webp": data, "txt": b""}), RGB)  # by content, whatever it is called
    with pytest.raises(BadSample, match=r"no picture: found \.gif, \.txt"):
        picture({"gif": b"", "txt": b""})


def test_captions() -> None:
    def read(txt: bytes | None = None, json_: object = None) -> tuple[tuple[str, ...], dict[str, str]]:
        fields = {} if txt is None else {"txt": txt}
        return captions_and_labels(fields | ({} if json_ is None else {"json": json.dumps(json_).encode()}))

    assert read(b" a dog \n") == (("a dog",), {})
    assert read("\ufeffün".encode()) == (("ün",), {})
    both = {"captions": ["a", "b", "a"], "labels": {"tone": "dark"}, "similarity": 0.3}
    assert read(b"a", both) == (("a", "b"), {"tone": "dark"})
    assert read(b"c", both)[0] == ("c", "a", "b")
    assert read(None, {"caption": "from img2dataset"})[0] == ("from img2dataset",)
    assert read(b"t", {"caption": "from img2dataset"})[0] == ("t",)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "no caption"),
        ({"json": b"{}"}, "no caption"),
        ({"txt": b"  \n"}, "caption is empty"),
        ({"txt": b"\x00\x01"}, "caption is empty"),
        ({"txt": b"caf\xe9"}, "caption is not UTF-8: byte 0xe9 at 3"),
        ({"txt": b"a" * 2_000_000}, "caption is too long: 2,000,000 bytes"),
        ({"json": b"{"}, "metadata is not JSON"),
        ({"json": b"[1]"}, "metadata is not JSON: an object"),
        ({"json": b"[" * 100_000}, "metadata is not JSON"),
        ({"json": b"\xff"}, "metadata is not UTF-8"),
        ({"json": b'{"captions": "b"}'}, "captions must be a list"),
        ({"json": b'{"captions": [1]}'}, "captions must be a list"),
        ({"json": b'{"captions": ["\\ud800"]}'}, "half of a surrogate pair"),
    ],
)
def test_bad_captions(fields: dict[str, bytes], reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        captions_and_labels(fields)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


def test_resize_is_pillows_bicubic() -> None:
    for size in ((32, 32), (17, 40), (200, 200)):
        theirs = np.asarray(Image.fromarray(SMOOTH).resize(size[::-1], Image.Resampling.BICUBIC))
        assert psnr(resized(SMOOTH, *size), theirs) > 50


def test_crops_are_parts_of_the_picture() -> None:
    assert np.array_equal(centre_crop(SMOOTH, 90), SMOOTH[:, 20:110])
    assert np.array_equal(random_crop(SMOOTH[:, :90], 90, NO_CROP, np.random.default_rng(0)), SMOOTH[:, :90])
    mirrored = AugmentConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=True)
    flipped = [
        np.array_equal(random_crop(SMOOTH[:, :90], 90, mirrored, np.random.default_rng(n)), SMOOTH[:, 89::-1])
        for n in range(100)
    ]
    assert 30 < sum(flipped) < 70


def test_random_crop_keeps_to_its_bounds() -> None:
    """Columns and rows painted with their number: the crop's corners tell which part was taken."""
    rows, columns = np.mgrid[0:200, 0:250].astype(np.uint8)
    ramp = np.dstack([rows, columns, rows])
    augment = AugmentConfig(crop_scale=(0.3, 0.5), crop_ratio=(0.8, 1.25))
    areas = []
    for n in range(200):
        crop = random_crop(ramp, 64, augment, np.random.default_rng(n)).astype(float)
        height = (crop[-1, 0, 0] - crop[0, 0, 0]) * 64 / 63
        width = (crop[0, -1, 1] - crop[0, 0, 1]) * 64 / 63
        assert 0.75 < width / height < 1.33
        areas.append(height * width / (200 * 250))
    assert 0.28 < min(areas) < 0.32
    assert 0.47 < max(areas) < 0.53


def test_views_and_odd_shapes() -> None:
    assert resized(SMOOTH[::-1, ::-1], 8, 8).shape == (8, 8, 3)
    for shape in ((1, 1, 3), (1, 500, 3), (500, 1, 3), (3, 2, 3)):
        image = np.full(shape, 77, np.uint8)
        assert (random_crop(image, 16, AugmentConfig(), np.random.default_rng(0)) == 77).all()
        assert (centre_crop(image, 16) == 77).all()


def test_one_thread_or_two_give_the_same_pixels() -> None:
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(resized(SMOOTH, 64, 64))
    torch.set_num_threads(threads)
    assert np.array_equal(*results)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("exif", [False, True])
def test_scaled_decoding(monkeypatch: pytest.MonkeyPatch, fast: bool, exif: bool) -> None:
    if not fast:
        monkeypatch.setattr(decode, "simplejpeg", None)
    large = Image.fromarray(SMOOTH).resize((1300, 900), Image.Resampling.BICUBIC)
    turned = Image.Exif()
    turned[0x0112] = 6
    data = encoded(large, "JPEG", quality=95, **({"exif": turned} if exif else {}))
    whole = decode_image(data)
    assert max(whole.shape) == 1300
    for least, most in ((0, 900), (225, 225), (224, 225), (226, 450), (900, 900), (5000, 900)):
        small = decode_image(data, least)
        assert min(small.shape[:2]) >= min(least, 900)
        assert min(small.shape[:2]) <= most
        assert (small.shape[0] < small.shape[1]) == (not exif)
        if small.shape != whole.shape:
            assert 35 < psnr(resized(small, 224, 224), resized(whole, 224, 224)) < 60
    png = encoded(large, "PNG")
    assert decode_image(png, 100).shape == (900, 1300, 3)
