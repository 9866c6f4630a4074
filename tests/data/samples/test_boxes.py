"""Boxes: what is read, that they stay on what they frame through crop, flip and resize, and which are dropped."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from treering.data import Batch, DataConfig, Loader, Tokenizer
from treering.data.errors import BadSample
from treering.data.samples.boxes import SampleBoxes, crop_boxes, read_boxes
from treering.data.samples.decode import Crop

WriteTar = Callable[..., Path]
WHOLE = Crop(0, 0, 40, 80, False)


def boxes(*corners: list[float], text: str = "t") -> dict[str, Any]:
    return {"boxes": [{"box": each, "text": text} for each in corners]}


def test_units() -> None:
    pixels = read_boxes(boxes([8, 10, 40, 20], [-5, 0, 100, 40], text=" a dog "), "pixels", 40, 80)
    assert pixels.corners.tolist() == [[0.1, 0.25, 0.5, 0.5], [0, 0, 1, 1]]
    assert pixels.texts == ("a dog", "a dog")
    relative = read_boxes(boxes([0.1, 0.25, 0.5, 0.5], [0, -0.1, 1.0001, 1]), "relative", 40, 80)
    assert relative.corners.tolist() == [[0.1, 0.25, 0.5, 0.5], [0, 0, 1, 1]]
    assert read_boxes({}, "pixels", 40, 80).corners.shape == (0, 4)


ONE = {"box": [0, 0, 1, 1], "text": "t"}


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ("x", "they must be a list of at most 1,000"),
        ([ONE] * 1001, "they must be a list of at most 1,000"),
        (["x"], "each must be {box: [x0, y0, x1, y1], text}"),
        ([{"text": "t"}], "each must be {box"),
        ([{"box": [0, 0, 1], "text": "t"}], "each must be {box"),
        ([{"box": [0, 0, 1, None], "text": "t"}], "each must be {box"),
        ([{"box": [0, 0, 1, True], "text": "t"}], "each must be {box"),
        ([{"box": [0, 0, 1, float("nan")], "text": "t"}], "each must be {box"),
        ([{"box": [0, 0, 1, float("inf")], "text": "t"}], "each must be {box"),
        ([{"box": [0, 0, 1, 10**400], "text": "t"}], "each must be {box"),
        ([{"box": [1, 0, 1, 1], "text": "t"}], "[1, 0, 1, 1] must have left < right and top < bottom"),
        ([{"box": [0, 2, 1, 1], "text": "t"}], "[0, 2, 1, 1] must have left < right"),
        ([{"box": [0, 0, 1, 1]}], "each must have a text of at most 10,000 characters"),
        ([{"box": [0, 0, 1, 1], "text": "t" * 10_001}], "each must have a text"),
        ([{"box": [0, 0, 1, 1], "text": " \n"}], "a box's text is empty"),
        ([{"box": [0, 0, 1, 1], "text": "\ud800"}], "a box's text is not Unicode"),
        ([ONE, {"box": [10, 10, 60, 30], "text": "t"}], "the recipe says relative, but one exceeds"),
    ],
)
def test_what_is_wrong(found: Any, reason: str) -> None:
    with pytest.raises(BadSample) as error:
        read_boxes({"boxes": found}, "relative", 40, 80)
    assert reason in str(error.value)
    assert str(error.value).startswith(("boxes are wrong: ", "a box's text is "))


def test_a_whole_picture_changes_nothing() -> None:
    given_ = read_boxes(boxes([0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1]), "relative", 40, 80)
    for least in (0.0, 0.5, 1.0):
        assert np.array_equal(crop_boxes(given_, WHOLE, 40, 80, least).corners, given_.corners)
    mirrored = crop_boxes(given_, WHOLE._replace(mirrored=True), 40, 80, 0.5).corners
    assert np.allclose(mirrored, [[0.7, 0.2, 0.9, 0.4], [0, 0, 1, 1]], atol=1e-15)


@st.composite
def intervals(draw: st.DrawFn, size: int) -> tuple[int, int]:
    start = draw(st.integers(0, size - 1))
    return start, draw(st.integers(start + 1, size))


@given(st.data(), st.booleans(), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
@settings(max_examples=600, deadline=None)
def test_against_counted_pixels(data: st.DataObject, mirrored: bool, least: float) -> None:
    """A mask of the box, cut and mirrored as an array, says where it lies and how much of it is left."""
    height, width = 12, 15
    (x0, x1), (y0, y1) = data.draw(intervals(width)), data.draw(intervals(height))
    (left, right), (top, bottom) = data.draw(intervals(width)), data.draw(intervals(height))
    mask = np.zeros((height, width), bool)
    mask[y0:y1, x0:x1] = True
    part = mask[top:bottom, left:right]
    part = part[:, ::-1] if mirrored else part
    found = crop_boxes(
        read_boxes(boxes([x0, y0, x1, y1]), "pixels", height, width),
        Crop(top, left, bottom - top, right - left, mirrored),
        height,
        width,
        least,
    )
    stays = part.any() and part.sum() >= least * mask.sum()
    assert len(found.texts) == len(found.corners) == stays
    if stays:
        rows, columns = np.nonzero(part.any(1))[0], np.nonzero(part.any(0))[0]
        edges = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], float)
        assert np.allclose(found.corners[0] * (part.shape[::-1] * 2), edges, atol=1e-9)


def test_a_box_outside_its_picture_is_dropped() -> None:
    outside = read_boxes(boxes([100, 100, 200, 200], [-9, -9, -1, -1], [0, 0, 80, 40]), "pixels", 40, 80)
    assert crop_boxes(outside, WHOLE, 40, 80, 0.0).corners.tolist() == [[0, 0, 1, 1]]


# In a run


RESOLUTION, CONTEXT = 64, 12


def framed(n: int) -> tuple[bytes, dict[str, Any]]:
    """A black picture with a red and a green rectangle, and their boxes; every fifth one has none."""
    random = np.random.default_rng(n)
    height, width = int(random.integers(80, 160)), int(random.integers(80, 160))
    pixels, found = np.zeros((height, width, 3), np.uint8), []
    for channel in range(2 if n % 5 else 0):
        half = channel * height // 2
        top, left = half + int(random.integers(2, 8)), int(random.integers(2, 30))
        bottom, right = half + height // 2 - int(random.integers(2, 8)), width - int(random.integers(2, 30))
        pixels[top:bottom, left:right, channel] = 255
        found.append({"box": [left, top, right, bottom], "text": f"{('red', 'green')[channel]} in picture {n}"})
    exif = Image.Exif()
    exif[0x0112] = 3  # stored head down: boxes are of the upright picture
    file = io.BytesIO()
    Image.fromarray(pixels[::-1, ::-1]).save(file, "PNG", exif=exif)
    return file.getvalue(), {"boxes": found} if found else {}


def url_of(path: Path, write_tar: WriteTar, unit: str) -> str:
    members = []
    for n in range(20):
        picture, metadata = framed(n)
        if unit == "relative":
            size = Image.open(io.BytesIO(picture)).size * 2
            for each in metadata.get("boxes", []):
                each["box"] = [edge / side for edge, side in zip(each["box"], size, strict=True)]
        members += [
            (f"{n:02}.png", picture),
            (f"{n:02}.txt", b"caption"),
            (f"{n:02}.json", json.dumps(metadata).encode()),
        ]
    return str(write_tar(path, members))


def batches(train: list[dict[str, Any]], steps: int, rank: int = 0, world: int = 1, **options: Any) -> list[Batch]:
    augment = {"crop_scale": (0.3, 1.0), "flip": True, **options}
    config = DataConfig.model_validate({"train": train, "batch": 8, "augment": augment})
    with closing(Loader(config, RESOLUTION, CONTEXT, 2, rank, world).batches(0)) as each:
        return list(islice(each, steps))


def of_each(batch: Batch) -> list[list[tuple[str, list[int], np.ndarray]]]:
    """The boxes of each picture: text, tokens, corners."""
    assert batch.boxes is not None
    texts, tokens = iter(batch.boxes.texts), iter(batch.boxes.tokens.split(batch.boxes.lengths.tolist()))
    corners = iter(batch.boxes.corners.double().numpy())
    return [[(next(texts), next(tokens).tolist(), next(corners)) for _ in range(count)] for count in batch.boxes.counts]


@pytest.mark.parametrize("unit", ["pixels", "relative"])
def test_boxes_stay_on_what_they_frame(tmp_path: Path, write_tar: WriteTar, unit: str) -> None:
    url, met, cut = url_of(tmp_path / "0.tar", write_tar, unit), 0, 0
    for batch in batches([{"source": url, "boxes": unit}], 25, min_box_fraction=0.0):
        assert batch.boxes is not None
        assert [batch.boxes.corners.dtype, batch.boxes.tokens.dtype] == [torch.float32, torch.int64]
        for key, image, own in zip(batch.keys, batch.images.permute(0, 2, 3, 1).numpy(), of_each(batch), strict=True):
            for text, tokens, corners in own:
                channel = ("red", "green").index(text.split()[0])
                assert text.endswith(f" {int(key)}")
                assert tokens == Tokenizer().encode(text, CONTEXT)
                shown = image[..., channel] > 127
                if not shown.any():  # a sliver thinner than a pixel
                    assert min(corners[2] - corners[0], corners[3] - corners[1]) * RESOLUTION < 1
                    continue
                rows, columns = np.nonzero(shown.any(1))[0], np.nonzero(shown.any(0))[0]
                edges = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
                assert np.abs(corners * RESOLUTION - edges).max() < 1.01
                met += 1
                cut += bool((corners == 0).any() or (corners == 1).any())
            seen = {text.split()[0] for text, *_ in own}
            assert all((image[..., i] > 127).sum() < 1 for i, name in enumerate(("red", "green")) if name not in seen)
    assert met > 200
    assert cut > 50


def test_what_is_left_decides(tmp_path: Path, write_tar: WriteTar) -> None:
    url = url_of(tmp_path / "0.tar", write_tar, "pixels")
    counts = [
        sum(
            int(b.boxes.counts.sum())
            for b in batches([{"source": url, "boxes": "pixels"}], 10, min_box_fraction=least)
            if b.boxes
        )
        for least in (0.0, 0.5, 1.0)
    ]
    assert counts[0] > counts[1] > counts[2] > 0


def test_one_stream_and_only_where_asked_for(tmp_path: Path, write_tar: WriteTar) -> None:
    with_boxes, without = ({"source": url_of(tmp_path / f"{n}.tar", write_tar, "pixels")} for n in range(2))
    with_boxes |= {"boxes": "pixels"}
    whole = batches([with_boxes, without], 5)
    halves = [batches([with_boxes, without], 5, rank, 2) for rank in range(2)]
    plain = batches([{k: v for k, v in with_boxes.items() if k != "boxes"}, without], 5)
    for step, batch in enumerate(whole):
        assert batch.boxes is not None
        expected = [(text, tokens, corners.tolist()) for own in of_each(batch) for text, tokens, corners in own]
        ranks = [each for half in halves for own in of_each(half[step]) for each in own]
        assert [(text, tokens, corners.tolist()) for text, tokens, corners in ranks] == expected
        assert plain[step].boxes is None
        assert torch.equal(plain[step].images, batch.images)
        assert plain[step].keys == batch.keys
    assert any(not b.boxes.counts.all() for b in whole if b.boxes)


def test_pixels_of_pictures_that_are_decoded_smaller(tmp_path: Path, write_tar: WriteTar) -> None:
    """A large JPEG, stored on its side: the boxes are in pixels of the whole picture, upright."""
    members = []
    for n in range(8):
        pixels = np.zeros((600, 900, 3), np.uint8)
        pixels[100 : 300 + 20 * n, 200:700] = 255
        box = {"box": [200, 100, 700, 300 + 20 * n], "text": "white"}
        exif = Image.Exif()
        exif[0x0112] = 6  # to be shown turned to the right
        file = io.BytesIO()
        Image.fromarray(np.rot90(pixels)).save(file, "JPEG", quality=95, exif=exif)
        members += [
            (f"{n}.jpg", file.getvalue()),
            (f"{n}.txt", b"t"),
            (f"{n}.json", json.dumps({"boxes": [box]}).encode()),
        ]
    url = str(write_tar(tmp_path / "0.tar", members))
    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.5, 1.5)}
    for decode in ("exact", "scaled"):
        config = DataConfig.model_validate(
            {"train": [{"source": url, "boxes": "pixels"}], "batch": 8, "augment": whole, "decode": decode}
        )
        with closing(Loader(config, 60, CONTEXT, 2).batches(0)) as each:
            batch = next(each)
        assert not batch.bad
        assert batch.boxes is not None
        for key, corners, image in zip(batch.keys, batch.boxes.corners.double().numpy(), batch.images, strict=True):
            bottom = 300 + 20 * int(key)
            assert np.allclose(corners, [200 / 900, 100 / 600, 700 / 900, bottom / 600], atol=1e-6)
            rows = np.nonzero((image[0] > 127).any(1).numpy())[0]
            assert np.abs(np.array([rows[0], rows[-1] + 1]) - corners[[1, 3]] * 60).max() < 1.5


def test_pictures_without_boxes() -> None:
    assert SampleBoxes.none().tokenised(Tokenizer(), 8).tokens == ()
