"""From raw members to what the model sees: pictures as uint8 RGB, captions as text.

Decoding ends in plain RGB whatever came in: EXIF orientation applied, transparency laid on white, palette, grey, CMYK
and 16-bit converted. The crop is a view and one antialiased bicubic resize works on uint8; normalising is left to the
device, once a batch. Anything wrong with a sample is a BadSample with the reason, never a crash and never silence.
"""

from __future__ import annotations

import io
import json
import math
import struct
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from .config import AugmentConfig
from .draws import Draws
from .ledger import BadSample
from .shards import IMAGE_KINDS
from .text import clean

if TYPE_CHECKING:
    from numpy.typing import NDArray

try:
    import simplejpeg  # type: ignore[import-untyped,import-not-found,unused-ignore]
except ImportError:  # an optional faster JPEG decoder, over the same libjpeg-turbo
    simplejpeg = None

MOST_PIXELS = 1 << 26  # 8192 x 8192; beyond it a file is a decompression bomb or no photo
MOST_TEXT = 1 << 20  # bytes of a caption or its metadata
_FRAMES = (b"\xff\xc0", b"\xff\xc2")  # baseline and progressive
# Tables, comments, JFIF (APP0), colour profile (APP2), picture editors (APP12 to 14): none says which way up it is.
_PLAIN_SEGMENTS = frozenset(bytes((0xFF, kind)) for kind in (0xC4, 0xDB, 0xDD, 0xFE, 0xE0, 0xE2, 0xEC, 0xED, 0xEE))
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own bound is lower, and refuses


def picture(fields: dict[str, bytes], least: int = 0) -> NDArray[np.uint8]:
    """The picture among a record's members, as `decode_image` gives it. Raises BadSample."""
    for kind in IMAGE_KINDS:
        if kind in fields:
            return decode_image(fields[kind], least)
    found = ", ".join(f".{ascii(kind)[1:-1][:20]}" for kind in fields) or "nothing"
    raise BadSample(f"no picture: found {found}")


def decode_image(data: bytes, least: int = 0) -> NDArray[np.uint8]:
    """JPEG, PNG or WebP bytes as uint8 RGB [H, W, 3], upright. Raises BadSample.

    `least` > 0: a JPEG may come at a half, a quarter or an eighth of its size or in steps between, out of fewer
    coefficients of its cosine transforms, with sides of at least `least` pixels: faster for large photos, and softer.
    """
    try:
        if simplejpeg and _is_plain_jpeg(data):
            return np.asarray(simplejpeg.decode_jpeg(data, "RGB", min_height=least, min_width=least))
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            if image.width * image.height > MOST_PIXELS:
                raise BadSample(f"picture too large: {image.width} x {image.height} pixels")
            if simplejpeg and image.format == "JPEG" and image.mode == "RGB":
                pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=least, min_width=least)
            else:
                if least:
                    image.draft(None, (least, least))
                pixels = np.asarray(_rgb(image))
            return _upright(pixels, image.getexif().get(ExifTags.Base.Orientation, 1))
    except BadSample:
        raise
    except Image.DecompressionBombError:
        raise BadSample("picture too large: refused as a decompression bomb") from None
    except UnidentifiedImageError:
        raise BadSample("picture does not decode: neither JPEG, PNG nor WebP") from None
    except Exception as error:  # decoders raise whatever they like on hostile bytes
        raise BadSample(f"picture does not decode: {ascii(str(error))[1:-1][:100]}") from None


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether a JPEG has three channels, a size within bounds and no metadata that could turn it: then its pixels need
    no second look, and Pillow's reading of the header (a twentieth of the work) is left out. ITU T.81, annex B."""
    at = 2
    while data[:2] == b"\xff\xd8":
        marker, length = data[at : at + 2], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in _FRAMES:
            height, width, channels = struct.unpack_from(">HHB", data, at + 5)
            return channels == 3 and 0 < height * width <= MOST_PIXELS
        if marker not in _PLAIN_SEGMENTS or length < 2:
            return False
        at += 2 + length
    return False


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey; convert() would clip it
        deep = np.asarray(image).astype(np.float64)
        return Image.fromarray(np.round(deep / 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _upright(pixels: NDArray[np.uint8], orientation: Any) -> NDArray[np.uint8]:
    """EXIF 2.3, tag 0x0112: how the stored rows and columns are to be shown. A view."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def captions_and_labels(fields: dict[str, bytes]) -> tuple[tuple[str, ...], dict[str, str]]:
    """All captions of a record, that of its .txt first, and its labels. Raises BadSample.

    The .json may hold {"captions": [text, ...], "caption": text, "labels": {name: class}}; anything else in it is
    left alone.
    """
    captions = [_text(fields["txt"], "caption")] if "txt" in fields else []
    metadata = _metadata(fields["json"]) if "json" in fields else {}
    further = metadata.get("captions", [metadata["caption"]] if metadata.get("caption") and not captions else [])
    labels = metadata.get("labels", {})
    if not isinstance(further, list) or not all(isinstance(caption, str) for caption in further):
        raise BadSample("metadata is wrong: captions must be a list of texts")
    if not isinstance(labels, dict) or not all(isinstance(value, str) for value in labels.values()):
        raise BadSample("metadata is wrong: labels must map names to classes")
    captions = list(dict.fromkeys(caption.strip() for caption in (*captions, *further)))
    if not captions:
        raise BadSample("no caption: neither .txt nor captions in .json")
    for caption in captions:
        if not clean(caption):
            raise BadSample("caption is empty")
        if not caption.isascii() and any("\ud800" <= c <= "\udfff" for c in caption):
            raise BadSample("caption is not Unicode: it holds half of a surrogate pair")
    return tuple(captions), labels


def _text(data: bytes, what: str) -> str:
    if len(data) > MOST_TEXT:
        raise BadSample(f"{what} is too long: {len(data):,} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample(f"{what} is not UTF-8: byte 0x{data[error.start]:02x} at {error.start}") from None


def _metadata(data: bytes) -> dict[str, Any]:
    try:
        metadata = json.loads(_text(data, "metadata"))
    except (ValueError, RecursionError) as error:
        raise BadSample(f"metadata is not JSON: {ascii(str(error))[1:-1][:100]}") from None
    if not isinstance(metadata, dict):
        raise BadSample("metadata is not JSON: an object is expected")
    return metadata


def random_crop(
    image: NDArray[np.uint8], resolution: int, augment: AugmentConfig, random: Draws | np.random.Generator
) -> NDArray[np.uint8]:
    """A random part of the picture at resolution x resolution: area and shape as Inception crops them (Szegedy et al.
    2015, section 6), the whole centre where ten tries do not fit."""
    height, width = image.shape[:2]
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
    crop = resized(image[top : top + h, left : left + w], resolution, resolution)
    return crop[:, ::-1] if augment.flip and random.random() < 0.5 else crop


def centre_crop(image: NDArray[np.uint8], resolution: int) -> NDArray[np.uint8]:
    """The picture for evaluation: the largest centred square, at resolution x resolution. (Cropping before resizing
    and resizing the short side before cropping give the same square, up to one row of the source.)"""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return resized(image[top : top + side, left : left + side], resolution, resolution)


def resized(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Antialiased bicubic resize on uint8 [H, W, 3], which may be a view."""
    import torch  # 2 s: packing and indexing do without

    if any(step < 0 for step in image.strides) or not image.flags.writeable:
        image = image.copy()  # torch takes neither mirrored nor read-only views
    planes = torch.from_numpy(image)[None].permute(0, 3, 1, 2)  # in this order torch sees channels last, and is faster
    result = torch.nn.functional.interpolate(planes, (height, width), mode="bicubic", antialias=True)
    return result.permute(0, 2, 3, 1)[0].numpy()
