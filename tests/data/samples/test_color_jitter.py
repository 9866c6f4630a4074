"""Colour jitter against torchvision's tensor functions and colorsys, and that off is off."""

from __future__ import annotations

import colorsys
import importlib.util
import zlib
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from pydantic import ValidationError

from treering.data import Batch, DataConfig, Loader
from treering.data.config import JitterConfig
from treering.data.samples.color_jitter import brightened, contrasted, hue_shifted, jittered, saturated
from treering.tests.support.needs import missing

IMAGE = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
IMAGE[:2] = np.arange(24, dtype=np.uint8)[None, :, None] * 11  # greys
IMAGE[2, :3] = [[0, 0, 0], [255, 255, 255], [255, 0, 0]]
Change = Callable[[np.ndarray, float], np.ndarray]
ALL = JitterConfig(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, probability=1.0)


MORE = [-1.0, -0.4, -0.1, 0.25, 1.0]
TURNS = [-0.5, -0.21, -0.05, 0.0, 0.1, 0.33, 0.5]


def formula(name: str, factor: float) -> np.ndarray:
    """What torchvision documents, in doubles: a blend with black, with the mean grey, with the pixel's grey."""
    grey = IMAGE @ np.array([0.299, 0.587, 0.114])
    other = {"brightness": 0.0, "contrast": grey.mean(), "saturation": grey[..., None]}[name]
    return np.round((IMAGE * factor + other * (1 - factor)).clip(0, 255))


@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize(
    ("change", "name", "pillow"),
    [
        (brightened, "brightness", ImageEnhance.Brightness),
        (contrasted, "contrast", ImageEnhance.Contrast),
        (saturated, "saturation", ImageEnhance.Color),
    ],
)
def test_light_contrast_and_saturation(change: Change, name: str, pillow: Any, more: float) -> None:
    ours = change(IMAGE, more)
    assert ours.dtype == np.uint8
    off = np.abs(ours - formula(name, 1 + more))
    assert off.max() <= 1
    assert (off > 0).mean() < 0.01  # a float against a double, at a half
    theirs = np.asarray(pillow(Image.fromarray(IMAGE)).enhance(1 + more)).astype(int)
    assert np.abs(ours - theirs).max() <= 2  # they round the grey first, and cut down to a level
    assert np.abs(ours.astype(int) - IMAGE).max() > 10


@pytest.mark.parametrize("turn", TURNS)
def test_hue(turn: float) -> None:
    ours = hue_shifted(IMAGE, turn).astype(int)
    for pixel, was in zip(ours.reshape(-1, 3), IMAGE.reshape(-1, 3), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*(was / 255))
        assert np.abs(pixel - 255 * np.array(colorsys.hsv_to_rgb((h + turn) % 1, s, v))).max() <= 0.51
    assert np.array_equal(ours.max(2), IMAGE.max(2))
    assert np.array_equal(ours.min(2), IMAGE.min(2))
    assert np.array_equal(ours[:2], IMAGE[:2])  # greys have no hue


@pytest.mark.parametrize(
    ("change", "name", "mores"),
    [
        (brightened, "brightness", MORE),
        (contrasted, "contrast", MORE),
        (saturated, "saturation", MORE),
        (hue_shifted, "hue", TURNS),
    ],
)
def test_as_torchvision(change: Change, name: str, mores: list[float]) -> None:
    """Its functions on tensors, loaded by path: the package itself needs a build of its own for each torch."""
    package = importlib.util.find_spec("torchvision")
    if package is None or not package.submodule_search_locations:
        missing("torchvision is not installed")
    path = Path(package.submodule_search_locations[0]) / "transforms" / "_functional_tensor.py"
    spec = importlib.util.spec_from_file_location("torchvision_functional_tensor", path)
    assert spec is not None
    assert spec.loader is not None
    functional = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(functional)
    planes = torch.from_numpy(IMAGE).permute(2, 0, 1)
    for more in mores:
        factor = more if name == "hue" else 1 + more
        theirs = getattr(functional, f"adjust_{name}")(planes, factor).permute(1, 2, 0).numpy()
        assert np.abs(change(IMAGE, more).astype(int) - theirs).max() <= 1  # they cut down to a level, we round


def test_no_change_is_exactly_none() -> None:
    for change in (brightened, contrasted, saturated, hue_shifted):
        assert np.array_equal(change(IMAGE, 0.0), IMAGE)
    assert jittered(IMAGE, JitterConfig(probability=1.0), np.random.default_rng(0)) is IMAGE
    assert jittered(IMAGE, ALL.model_copy(update={"probability": 0.0}), np.random.default_rng(0)) is IMAGE


def test_shares() -> None:
    half = ALL.model_copy(update={"probability": 0.5, "grayscale": 0.2})
    pictures = [jittered(IMAGE, half, np.random.default_rng(n)) for n in range(1000)]
    grey = [(picture == picture[..., :1]).all() for picture in pictures]
    same = [picture is IMAGE for picture in pictures]
    assert 160 < sum(grey) < 240
    assert 350 < sum(same) < 450  # half of the 800 that are not grey
    plain = next(p for p, is_grey in zip(pictures, grey, strict=True) if is_grey)
    assert plain.shape == IMAGE.shape


def test_each_change_by_hand() -> None:
    """The draws in their order: two for the shares, four for the strengths, then the order of the changes."""
    orders = set()
    for n in range(40):
        random = np.random.default_rng(n)
        random.random(2)
        light, contrast, colour, hue = random.uniform(-1, 1, 4)
        expected = IMAGE
        order = random.permutation(4).tolist()
        for change in order:
            expected = [
                lambda i: brightened(i, 0.4 * light),  # noqa: B023
                lambda i: contrasted(i, 0.4 * contrast),  # noqa: B023
                lambda i: saturated(i, 0.4 * colour),  # noqa: B023
                lambda i: hue_shifted(i, 0.1 * hue),  # noqa: B023
            ][change](expected)
        assert np.array_equal(jittered(IMAGE, ALL, np.random.default_rng(n)), expected)
        alone = jittered(IMAGE, JitterConfig(hue=0.1, probability=1.0), np.random.default_rng(n))
        assert np.array_equal(alone, hue_shifted(IMAGE, 0.1 * hue))  # what is drawn does not depend on the others
        orders.add(tuple(order))
    assert len(orders) > 15


def test_config() -> None:
    assert not JitterConfig().active
    assert not JitterConfig(hue=0.5, probability=0).active
    assert JitterConfig(grayscale=0.1, probability=0).active
    assert JitterConfig(hue=0.1).active
    for wrong in ({"hue": 0.6}, {"brightness": 1.5}, {"grayscale": -0.1}):
        with pytest.raises(ValidationError):
            JitterConfig.model_validate(wrong)


# In a run


def batches(
    url: str, jitter: dict[str, float] | None, world: int = 1, workers: int = 0, steps: int = 3, **crop: Any
) -> list[list[Batch]]:
    augment: dict[str, Any] = {"crop_scale": (0.5, 1.0), **crop} | (
        {"color_jitter": jitter} if jitter is not None else {}
    )
    config = DataConfig.model_validate({"train": [{"source": url}], "batch": 8, "augment": augment, "workers": workers})
    ranks = []
    for rank in range(world):
        with closing(Loader(config, 24, 16, 5, rank, world).batches(0)) as each:
            ranks.append(list(islice(each, steps)))
    return ranks


def checksums(ranks: list[list[Batch]]) -> list[int]:
    return [zlib.crc32(i.numpy().tobytes()) for step in range(3) for rank in ranks for i in rank[step].images]


def test_a_run(tmp_path: Path, write_source: Callable[..., str]) -> None:
    url = write_source(tmp_path, 2, 7)
    plain = batches(url, None)
    off = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "probability": 0.0}
    assert checksums(batches(url, off)) == checksums(plain)
    some = {**off, "probability": 0.5, "grayscale": 0.2}
    alone = batches(url, some)
    same = [a == b for a, b in zip(checksums(alone), checksums(plain), strict=True)]
    assert 0 < sum(same) < len(same)
    for world, workers in ((2, 0), (4, 0), (1, 2)):
        assert checksums(batches(url, some, world, workers)) == checksums(alone)
    colours: dict[str, set[float]] = {}  # of the whole picture, pass after pass
    still = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.2, 1.2)}
    for batch in batches(url, {"hue": 0.5, "probability": 1.0}, steps=9, **still)[0]:
        for key, image in zip(batch.keys, batch.images, strict=True):
            colours.setdefault(key, set()).add(image[0].double().mean().item())
    assert all(len(seen) > 3 for seen in colours.values())
    grey = batches(url, {"grayscale": 1.0})
    for ours, theirs in zip(grey[0], plain[0], strict=True):  # the crop is that of the plain run
        light = (theirs.images.double() * torch.tensor([0.299, 0.587, 0.114]).double()[:, None, None]).sum(1)
        assert (ours.images.double() - light[:, None]).abs().max() <= 0.51
