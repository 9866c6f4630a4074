"""Decodes raw members into the model's input: pictures as uint8 RGB, captions as text.

Every picture is decoded to plain RGB: EXIF orientation applied, transparency composited on white, palette, grey, CMYK
and 16-bit converted. The crop is a view and one antialiased bicubic resize works on uint8; the device normalises whole
batches. Any fault of a sample is a BadSample with the reason, never a crash and never ignored.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ..config import AugmentConfig
from ..errors import BadSample
from ..shards.listing import IMAGE_KINDS
from .captions import read_texts
from .draws import Draws
from .picture_header import MOST_PIXELS, check_header, has_all_scans, without_metadata

if TYPE_CHECKING:
    from numpy.typing import NDArray

try:
    import simplejpeg  # type: ignore[import-untyped,import-not-found,unused-ignore]
except ImportError:  # an optional, faster JPEG decoder on the same libjpeg-turbo
    simplejpeg = None

_BAND = 1 << 22  # pixels converted at a time, so that no copy of a large picture is made for it
_END = b"\xff\xd9"  # of a JPEG
_NOISE = b"\x55\xaa\x33\xcc\xb6\x6d\xdb\x0f" * 9  # in a scan, any data decodes to something
_RESTARTS = b"".join(bytes((0xFF, 0xD0 + n)) + _NOISE[n:] for n in range(8))
_TAILS = (*(_NOISE[n:] for n in range(8)), _RESTARTS)
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our bound is lower and refuses the picture
warnings.filterwarnings("ignore", module="PIL.TiffImagePlugin")  # EXIF that cannot be read is beside the point


def picture(
    fields: Mapping[str, bytes], kinds: Collection[str] = (), min_side: int = 0, unfinished: bool = True
) -> NDArray[np.uint8]:
    """The picture among a record's members, decoded by `decode_image`: uint8 RGB [H, W, 3]. `kinds` are all members of
    the sample, named in the error. Raises BadSample."""
    for kind in IMAGE_KINDS:
        if kind in fields:
            return decode_image(fields[kind], min_side, unfinished)
    found = ", ".join(f".{ascii(kind)[1:-1][:20]}" for kind in kinds or fields) or "nothing"
    dotted = any(kind.rpartition(".")[2] in IMAGE_KINDS for kind in kinds or fields)
    raise BadSample(f"no picture: found {found}" + ("; a key ends at its first dot" if dotted else ""))


def decode_image(data: bytes, min_side: int = 0, unfinished: bool = True) -> NDArray[np.uint8]:
    """JPEG, PNG or WebP bytes as uint8 RGB [H, W, 3], upright. Raises BadSample.

    `min_side` > 0: a JPEG may be decoded at a reduced size (n/8 of the original, from fewer DCT coefficients) with
    sides of at least `min_side` pixels: faster for large photos, but softer. With `unfinished` a JPEG without its end
    mark is decoded if all its rows are there. Metadata that cannot be read makes no picture bad.
    """
    plain = check_header(data)
    try:
        return _decoded(data, min_side, plain)
    except BadSample:
        raise
    except Exception as error:  # decoders may raise anything on hostile bytes
        for repair in (without_metadata, *((_finished,) if unfinished else ())):
            with suppress(Exception):
                if (repaired := repair(data)) is not None:
                    return _decoded(repaired, min_side, False)
        raise _undecodable(error) from None


def _decoded(data: bytes, min_side: int, plain: bool) -> NDArray[np.uint8]:
    if plain and (fast := _fast_jpeg(data, min_side)) is not None:
        return fast
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
        if image.width * image.height > MOST_PIXELS:
            raise BadSample(f"picture too large: {image.width} x {image.height} pixels")
        fast = _fast_jpeg(data, min_side) if image.format == "JPEG" and image.mode == "RGB" else None
        if fast is None and min_side:
            image.draft(None, (min_side, min_side))
        pixels = _rgb(image) if fast is None else fast
        return _upright(pixels, _orientation(image))


def _undecodable(error: Exception) -> BadSample:
    if isinstance(error, Image.DecompressionBombError):
        return BadSample("picture too large: refused as a decompression bomb")
    if isinstance(error, UnidentifiedImageError):
        return BadSample("picture does not decode: neither JPEG, PNG nor WebP")
    return BadSample(f"picture does not decode: {ascii(str(error))[1:-1][:100]}")


def _finished(data: bytes) -> bytes | None:
    """A JPEG with the end mark that it lacks; None if rows or scans are missing too.

    A decoder fills what is missing with whatever comes behind, so a picture is whole if other bytes there change no
    pixel. (libjpeg only warns of missing data, and Pillow does not hand the warning on.)"""
    data = data.rstrip(b"\xff")  # half of an end mark
    if data[:2] != b"\xff\xd8" or not has_all_scans(data):
        return None
    pixels = _pillows(data + _END)
    whole = all(np.array_equal(pixels, _pillows(data + tail + _END)) for tail in _TAILS)
    return data + _END if whole else None


def _pillows(data: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        return np.asarray(image)


def _orientation(image: Image.Image) -> Any:
    """The EXIF orientation; 1, upright, if there is none that can be read."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow's parser may raise anything on foreign bytes
        return 1


def whole_sides(fields: Mapping[str, bytes]) -> tuple[int, int]:
    """Height and width of a record's upright picture at full size, for one that was decoded at a reduced size."""
    kind = next(kind for kind in IMAGE_KINDS if kind in fields)
    with Image.open(io.BytesIO(fields[kind]), formats=("JPEG", "PNG", "WEBP")) as image:
        turned = _orientation(image) in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


def _fast_jpeg(data: bytes, min_side: int) -> NDArray[np.uint8] | None:
    """The pixels of a colour JPEG by simplejpeg; None if it is not installed or refuses the file.

    It refuses damage that Pillow tolerates; Pillow then decides, so that usability does not depend on the
    installation."""
    if simplejpeg is None:
        return None
    try:
        return np.asarray(simplejpeg.decode_jpeg(data, "RGB", min_height=min_side, min_width=min_side))
    except ValueError:
        return None


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    """The pixels of a picture of any mode, converted band by band: a copy of all would take a gigabyte."""
    rows = max(1, _BAND // max(1, image.width))
    if rows >= image.height or (image.mode == "RGB" and "transparency" not in image.info):
        return np.asarray(_flat(image))
    image.load()
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        pixels[top : top + rows] = np.asarray(_flat(band))
    return pixels


def _flat(image: Image.Image) -> Image.Image:
    """The picture as RGB: transparency on white, 16 bits scaled to 8."""
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey; convert() would clip it
        deep = np.asarray(image).astype(np.float64)
        grey = np.round(deep / 257).clip(0, 255).astype(np.uint8)
        clear = image.info.get("transparency")
        return Image.fromarray(grey if clear is None else np.where(deep == clear, np.uint8(255), grey)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _upright(pixels: NDArray[np.uint8], orientation: Any) -> NDArray[np.uint8]:
    """A view of the pixels with the EXIF orientation (EXIF 2.3, tag 0x0112) applied."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def captions_and_labels(fields: dict[str, bytes], bare: bool = False) -> tuple[tuple[str, ...], dict[str, str]]:
    """All captions of a record regardless of tag, the one of its .txt first; and its labels. Raises BadSample without a
    caption or, if `bare`, a label."""
    texts = read_texts(fields, bare=bare)
    return tuple(dict.fromkeys(caption.text for caption in texts.captions)), texts.labels


class Crop(NamedTuple):
    """A rectangle of a picture, in pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool


def draw_crop(height: int, width: int, augment: AugmentConfig, random: Draws | np.random.Generator) -> Crop:
    """A random crop with area and aspect ratio as in Inception (Szegedy et al. 2015, section 6); the largest allowed
    centre crop if ten tries do not fit."""
    low, high = (math.log(ratio) for ratio in augment.crop_ratio)
    for _ in range(10):
        area = height * width * random.uniform(*augment.crop_scale)
        ratio = math.exp(random.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(random.integers(height - h + 1)), int(random.integers(width - w + 1))
            break
    else:
        w = min(width, max(1, round(height * augment.crop_ratio[1])))
        h = min(height, max(1, round(width / augment.crop_ratio[0])))
        top, left = (height - h) // 2, (width - w) // 2
    return Crop(top, left, h, w, augment.flip and random.random() < 0.5)


def cropped(image: NDArray[np.uint8], crop: Crop, resolution: int) -> NDArray[np.uint8]:
    """The crop of the picture, resized to uint8 [resolution, resolution, 3]."""
    part = image[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    shown = resized(part, resolution, resolution)
    return shown[:, ::-1] if crop.mirrored else shown


def random_crop(
    image: NDArray[np.uint8], resolution: int, augment: AugmentConfig, random: Draws | np.random.Generator
) -> NDArray[np.uint8]:
    """A random crop of the picture, resized to uint8 [resolution, resolution, 3]."""
    height, width = image.shape[:2]
    return cropped(image, draw_crop(height, width, augment, random), resolution)


def centre_crop(
    image: NDArray[np.uint8], resolution: int, resize: str = "crop", interpolation: str = "bicubic"
) -> NDArray[np.uint8]:
    """The picture for evaluation: the largest centred square, resized to uint8 [resolution, resolution, 3]. (Cropping
    before resizing and resizing the short side before cropping give the same square, up to one row of the source.)

    With `resize` = squash the whole picture is resized regardless of its shape; `interpolation` is bicubic or bilinear.
    """
    height, width = image.shape[:2]
    side = min(height, width)
    if resize == "crop":
        top, left = (height - side) // 2, (width - side) // 2
        image = image[top : top + side, left : left + side]
    return resized(image, resolution, resolution, interpolation)


def resized(image: NDArray[np.uint8], height: int, width: int, interpolation: str = "bicubic") -> NDArray[np.uint8]:
    """Antialiased resize of uint8 [H, W, 3], which may be a view."""
    import torch  # takes 2 s; packing and indexing do not need it

    if any(step < 0 for step in image.strides) or not image.flags.writeable:
        image = image.copy()  # torch accepts neither mirrored nor read-only views
    planes = torch.from_numpy(image)[None].permute(0, 3, 1, 2)  # torch sees channels last, which is faster
    result = torch.nn.functional.interpolate(planes, (height, width), mode=interpolation, antialias=True)
    return result.permute(0, 2, 3, 1)[0].numpy()
