"""Colour jitter on uint8 pictures: light, contrast, saturation and hue by random factors, and some pictures grey.

The four changes are those of torchvision's ColorJitter on tensors, in an order drawn for each picture, with one
difference: results are rounded to the nearest level instead of cut down to it, so that a row of changes does not
darken. The light and the contrast act on each level alone and go through a table of 256. What is drawn does not
depend on the strengths: switching one change on leaves the others as they were.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .config import JitterConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Picture = NDArray[np.uint8]  # [H, W, 3]

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


def jittered(image: Picture, jitter: JitterConfig, random: np.random.Generator) -> Picture:
    """The picture with its colours changed as `random` draws it; the very picture where nothing is drawn."""
    changed, grey = random.random(2) < (jitter.probability, jitter.grey)
    draws = random.uniform(-1, 1, 4)
    order = random.permutation(4)
    if changed:
        strengths = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        for change in order:
            if strengths[change]:
                image = _CHANGES[change](image, strengths[change] * float(draws[change]))
    return _levels(_grey(image)[..., None]).repeat(3, 2) if grey else image


def lit(image: Picture, more: float) -> Picture:
    """Every level times 1 + `more`."""
    return _levels(np.arange(256, dtype=np.float32) * np.float32(1 + more))[image]


def contrasted(image: Picture, more: float) -> Picture:
    """Every level's distance to the picture's mean grey times 1 + `more`."""
    mean = np.float32(_grey(image).mean(dtype=np.float64))
    return _levels(mean + (np.arange(256, dtype=np.float32) - mean) * np.float32(1 + more))[image]


def saturated(image: Picture, more: float) -> Picture:
    """Every pixel's distance to its own grey times 1 + `more`."""
    grey = _grey(image)[..., None]
    return _levels(grey + (image - grey) * np.float32(1 + more))


def turned(image: Picture, turn: float) -> Picture:
    """Every hue moved on by `turn` of the colour circle; lightest and darkest channel of a pixel keep their levels.

    The channels as functions of the hue are Smith's hexcone (1978): V - (V - min) * clip(min(k, 4 - k), 0, 1) with
    k = n + 6 hue mod 6, and n = 5, 3, 1 for red, green, blue.
    """
    red, green, blue = image.astype(np.float32).transpose(2, 0, 1)
    light, dark = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    spread = light - dark
    whole = np.where(spread > 0, spread, np.float32(1))
    sixths = np.where(
        light == red,
        (green - blue) / whole,
        np.where(light == green, 2 + (blue - red) / whole, 4 + (red - green) / whole),
    )
    channels = []
    for n in (5, 3, 1):
        k = sixths + np.float32(n + 6 * turn)
        k -= 6 * np.floor(k / 6)
        channels.append(light - spread * np.clip(np.minimum(k, 4 - k), 0, 1))
    return _levels(np.stack(channels, 2))


_CHANGES = (lit, contrasted, saturated, turned)


def _grey(image: Picture) -> NDArray[np.float32]:
    """The light of every pixel, [H, W]."""
    return image.astype(np.float32) @ _LUMA


def _levels(values: NDArray[np.float32]) -> Picture:
    return np.rint(values).clip(0, 255).astype(np.uint8)
