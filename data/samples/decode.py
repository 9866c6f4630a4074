"""Decodes raw members into the model's input: pictures as uint8 RGB, captions as text.

Every picture is decoded to plain RGB: EXIF orientation applied, transparency composited on white, palette, grey, CMYK
and 16-bit converted. The crop is a view and one antialiased bicubic resize works on uint8; the device normalises whole
batches. Any fault of a sample is a BadSample with the reason, never a crash and never ignored.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ..config import AugmentConfig
from ..errors import BadSample
from ..shards.listing import IMAGE_KINDS
from .captions import read_texts
from .draws import Draws

if TYPE_CHECKING:
    from numpy.typing import NDArray

try:
    import simplejpeg  # type: ignore[import-untyped,import-not-found,unused-ignore]
except ImportError:  # an optional, faster JPEG decoder on the same libjpeg-turbo
    simplejpeg = None

MOST_PIXELS = 1 << 26  # 8192 x 8192; a larger picture is a decompression bomb or not a photo
MOST_SCANS = 100  # of a progressive JPEG; encoders write about a dozen, and decoding each covers the whole picture
_SCAN = b"\xff\xda"  # starts a scan and occurs nowhere else: in data, 0xff is followed by zero
_FRAMES = (b"\xff\xc0", b"\xff\xc2")  # baseline and progressive
# Tables, comments, JFIF (APP0), colour profile (APP2), picture editors (APP12 to 14): none sets the orientation.
_PLAIN_SEGMENTS = frozenset(bytes((0xFF, kind)) for kind in (0xC4, 0xDB, 0xDD, 0xFE, 0xE0, 0xE2, 0xEC, 0xED, 0xEE))
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our bound is lower and refuses the picture


def picture(fields: Mapping[str, bytes], kinds: Collection[str] = (), min_side: int = 0) -> NDArray[np.uint8]:
    """The picture among a record's members, decoded by `decode_image`: uint8 RGB [H, W, 3]. `kinds` are all members of
    the sample, named in the error. Raises BadSample."""
    for kind in IMAGE_KINDS:
        if kind in fields:
            return decode_image(fields[kind], min_side)
    found = ", ".join(f".{ascii(kind)[1:-1][:20]}" for kind in kinds or fields) or "nothing"
    raise BadSample(f"no picture: found {found}")


def decode_image(data: bytes, min_side: int = 0) -> NDArray[np.uint8]:
    """JPEG, PNG or WebP bytes as uint8 RGB [H, W, 3], upright. Raises BadSample.

    `min_side` > 0: a JPEG may be decoded at a reduced size (n/8 of the original, from fewer DCT coefficients) with
    sides of at least `min_side` pixels: faster for large photos, but softer.
    """
    try:
        if _is_plain_jpeg(data) and (fast := _fast_jpeg(data, min_side)) is not None:
            return fast
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            if image.width * image.height > MOST_PIXELS:
                raise BadSample(f"picture too large: {image.width} x {image.height} pixels")
            if image.info.get("progressive") and data.count(_SCAN) > MOST_SCANS:
                raise BadSample(f"picture too slow: {data.count(_SCAN):,} scans")
            fast = _fast_jpeg(data, min_side) if image.format == "JPEG" and image.mode == "RGB" else None
            if fast is None and min_side:
                image.draft(None, (min_side, min_side))
            pixels = np.asarray(_rgb(image)) if fast is None else fast
            return _upright(pixels, image.getexif().get(ExifTags.Base.Orientation, 1))
    except BadSample:
        raise
    except Image.DecompressionBombError:
        raise BadSample("picture too large: refused as a decompression bomb") from None
    except UnidentifiedImageError:
        raise BadSample("picture does not decode: neither JPEG, PNG nor WebP") from None
    except Exception as error:  # decoders may raise anything on hostile bytes
        raise BadSample(f"picture does not decode: {ascii(str(error))[1:-1][:100]}") from None


def whole_sides(fields: Mapping[str, bytes]) -> tuple[int, int]:
    """Height and width of a record's upright picture at full size, for one that was decoded at a reduced size."""
    kind = next(kind for kind in IMAGE_KINDS if kind in fields)
    with Image.open(io.BytesIO(fields[kind]), formats=("JPEG", "PNG", "WEBP")) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
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


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether a JPEG has three channels, a size within bounds and no metadata that could rotate it.

    If so, Pillow's parsing of the header (a twentieth of the work) can be skipped. ITU T.81, annex B."""
    at = 2
    while data[:2] == b"\xff\xd8":
        marker, length = data[at : at + 2], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in _FRAMES:
            height, width, channels = struct.unpack_from(">HHB", data, at + 5)
            fast = marker == _FRAMES[0] or data.count(_SCAN) <= MOST_SCANS
            return fast and channels == 3 and 0 < height * width <= MOST_PIXELS
        if marker not in _PLAIN_SEGMENTS or length < 2:
            return False
        at += 2 + length
    return False


def _rgb(image: Image.Image) -> Image.Image:
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


def captions_and_labels(fields: dict[str, bytes]) -> tuple[tuple[str, ...], dict[str, str]]:
    """All captions of a record regardless of tag, the one of its .txt first; and its labels. Raises BadSample."""
    texts = read_texts(fields)
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
