"""Colour jitter on uint8 pictures: random brightness, contrast, saturation and hue, and random greyscale.

Why not torchvision.transforms.v2.functional: its results differ in the last bit between processors, and every machine
must produce the same picture.

The four changes are those of torchvision's ColorJitter on tensors, in an order drawn for each picture, with one
difference: results are rounded to the nearest level instead of truncated, so that repeated changes do not darken the
picture. Brightness and contrast map each level independently and use a table of 256 entries. The draws do not depend on
the strengths: enabling one change does not alter the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..config import JitterConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Picture = NDArray[np.uint8]  # [H, W, 3]

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)[:, None, None]  # ITU-R BT.601


def jittered(image: Picture, jitter: JitterConfig, random: np.random.Generator) -> Picture:
    """The picture with its colours changed as drawn from `random`; the input itself if nothing is changed."""
    changed, grey = random.random(2) < (jitter.probability, jitter.grayscale)
    draws = random.uniform(-1, 1, 4)
    order = random.permutation(4)
    if changed:
        strengths = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        for change in order:
            if strengths[change]:
                image = _CHANGES[change](image, strengths[change] * float(draws[change]))
    return _levels(_grey(image)[..., None]).repeat(3, 2) if grey else image


def brightened(image: Picture, more: float) -> Picture:
    """Scales every level by 1 + `more`."""
    return _levels(np.arange(256, dtype=np.float32) * np.float32(1 + more))[image]


def contrasted(image: Picture, more: float) -> Picture:
    """Scales every level's distance to the picture's mean grey by 1 + `more`."""
    mean = np.float32(_grey(image).mean(dtype=np.float64))
    return _levels(mean + (np.arange(256, dtype=np.float32) - mean) * np.float32(1 + more))[image]


def saturated(image: Picture, more: float) -> Picture:
    """Scales every pixel's distance to its grey value by 1 + `more`."""
    channels, grey = _channels(image), _grey(image)
    grey *= np.float32(-more)
    channels *= np.float32(1 + more)
    channels += grey
    return _picture(channels)


def hue_shifted(image: Picture, turn: float) -> Picture:
    """Shifts every hue by the fraction `turn` of the colour circle; value and chroma of a pixel stay the same.

    The channels as functions of the hue are Smith's hexcone (1978): V - (V - min) * clip(min(k, 4 - k), 0, 1) with
    k = n + 6 hue mod 6, and n = 5, 3, 1 for red, green, blue.
    """
    channels = _channels(image)
    red, green, blue = channels
    light, dark = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    chroma = light - dark
    scale = np.float32(1) / np.maximum(chroma, np.float32(1))  # for a grey pixel, 0 is divided by 1
    sixths = np.where(
        light == red,
        (green - blue) * scale,
        np.where(light == green, (blue - red) * scale + np.float32(2), (red - green) * scale + np.float32(4)),
    )
    for channel, n in zip(channels, (5, 3, 1), strict=True):
        np.add(sixths, np.float32(n + 6 * turn), out=channel)
        channel -= np.floor(channel / np.float32(6)) * np.float32(6)
        np.minimum(channel, np.float32(4) - channel, out=channel)
        np.clip(channel, np.float32(0), np.float32(1), out=channel)
        channel *= chroma
        np.subtract(light, channel, out=channel)
    return _picture(channels)


_CHANGES = (brightened, contrasted, saturated, hue_shifted)


def _channels(image: Picture) -> NDArray[np.float32]:
    """The channels as contiguous float32 [3, H, W]: arithmetic on interleaved channels is several times slower."""
    return np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32)


def _picture(channels: NDArray[np.float32]) -> Picture:
    return np.stack(list(_levels(channels)), 2)


def _grey(image: Picture) -> NDArray[np.float32]:
    """The luma of every pixel, float32 [H, W]. (Not a matrix product, whose last bit may differ between CPUs.)"""
    red, green, blue = channels = _channels(image)
    channels *= _LUMA
    red += green
    red += blue
    return red


def _levels(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    np.rint(values, out=values)
    return np.clip(values, np.float32(0), np.float32(255), out=values).astype(np.uint8)
