"""A trained model for Python: pictures and texts to embeddings, and pictures to captions, on any device.

    model = treering.load("runs/emoji")
    similarity = model.encode_image(model.preprocess("cat.png"), True) @ model.encode_text("a cat", True).T

`treering.load` takes a commit or a run folder, an exported folder of either format, or `open_clip:` weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.errors import BadSample
from ..data.samples.clip_tokenizer import TextTokenizer
from ..data.samples.decode import centre_crop, decode_image
from ..data.samples.tokenizer import open_tokenizer
from ..models.interchange.files import open_weights
from ..models.interchange.open_clip_files import PREFIX
from ..models.model import Model, empty, materialise
from ..models.spec import ModelSpec
from .checkpoint.commits import find_commit
from .evaluate.generate import CaptionDecoding, write
from .starting.import_weights import checked_tokenizer

if TYPE_CHECKING:
    from PIL.Image import Image

    from .offloading import Memory


Picture: TypeAlias = "Image | str | Path | bytes | np.ndarray"
"""a PIL picture, a path, the bytes of a JPEG, PNG or WebP file, or uint8 [H, W, 3]"""


class Loaded:
    """A model with what it needs to be used; its weights are fixed and in fp32."""

    def __init__(self, model: Model, tokenizer: TextTokenizer, source: str, elsewhere: object = None) -> None:
        """`elsewhere` must exist as long as the model: the folder of blocks that are on disk."""
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        """`encode(text, context)` gives the ids of a text, `decode(ids)` readable text"""
        self.source = source
        self._elsewhere = elsewhere

    @property
    def spec(self) -> ModelSpec:
        """The specification of the model."""
        return self.model.spec

    @property
    def device(self) -> torch.device:
        """The device that it computes on."""
        return self.model.logit_scale.device

    @property
    def logit_scale(self) -> float:
        """The factor on cosine similarities; with `logit_bias` added they are the logits it was trained on."""
        return self.model.scale().item()

    @property
    def logit_bias(self) -> float:
        """The bias on similarities, 0 for a model without one."""
        return 0.0 if self.model.logit_bias is None else self.model.logit_bias.item()

    def to(self, device: torch.device | str) -> Loaded:
        """Move it to a device; returns itself. ValueError for one that lies in several places."""
        if self._elsewhere is not None:
            raise ValueError("a model loaded with device_map = 'auto' cannot be moved; load it for another device")
        self.model.to(device)
        return self

    def preprocess(self, picture: Picture) -> Tensor:
        """A picture as the model sees it, uint8 [3, resolution, resolution]; normalising is left to the model.

        Takes a PIL picture, a path, the bytes of a JPEG, PNG or WebP file, or uint8 [H, W, 3]. Raises BadSample for
        bytes that are not pictures, OSError for a file that cannot be read, ValueError for anything else.
        """
        place = ""
        if isinstance(picture, str | Path):
            place = f"{str(picture)!r}: "
            if "://" in str(picture):
                raise ValueError(f"{str(picture)!r} is a URL, and pictures are read from paths; pass its bytes")
            picture = Path(picture).read_bytes()
        if isinstance(picture, bytes):
            try:
                pixels = decode_image(picture)
            except BadSample as error:
                raise BadSample(f"{place}{error}") from None
        elif isinstance(picture, np.ndarray):
            pixels = picture
        elif hasattr(picture, "convert"):
            pixels = np.asarray(picture.convert("RGB"))
        else:
            raise ValueError(f"a picture is one of PIL, a path, bytes or uint8 [H, W, 3], not {type(picture).__name__}")
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise ValueError(f"a picture is uint8 [H, W, 3], not {pixels.dtype} {list(pixels.shape)}")
        image = self.spec.image
        return torch.tensor(centre_crop(pixels, image.resolution, image.resize, image.interpolation)).permute(2, 0, 1)

    @torch.no_grad()
    def encode_image(self, images: Tensor | Picture | Sequence[Picture], normalize: bool = False) -> Tensor:
        """Embeddings [b, e] of pictures, of one or several as `preprocess` takes them, or of what it gives: uint8
        [b, 3, resolution, resolution], or one without b; unit rows if asked.

        Raises ValueError for another shape or type: values in 0..1 or normalised ones would give wrong embeddings.
        """
        found = self.model.embed_images(self._pictures(images)).pooled
        return F.normalize(found, dim=-1) if normalize else found

    @torch.no_grad()
    def encode_text(self, texts: str | Sequence[str] | Sequence[Sequence[int]], normalize: bool = False) -> Tensor:
        """Embeddings [b, e] of texts, or of their ids as the tokenizer gives them; unit rows if asked."""
        some = [texts] if isinstance(texts, str) else list(texts)
        if not some:
            raise ValueError("there is no text to embed; give at least one")
        context = self.spec.text.context
        ids = [self.tokenizer.encode(text, context) if isinstance(text, str) else list(text) for text in some]
        if any(not 0 < len(one) <= context for one in ids):
            raise ValueError(f"a text has no ids or more than the model's context of {context}; cut it")
        tokens = torch.tensor([i for one in ids for i in one], device=self.device)
        lengths = torch.tensor([len(one) for one in ids], device=self.device)
        found = self.model.embed_texts(tokens, lengths).pooled
        return F.normalize(found, dim=-1) if normalize else found

    def caption(
        self, images: Tensor | Picture | Sequence[Picture], writing: CaptionDecoding = "greedy", longest: int = 40
    ) -> list[str]:
        """A caption of each picture, of `longest` tokens at most; `writing` is greedy, beam or nucleus.

        images: as in `encode_image`. Raises ValueError if the model has no captioner.
        """
        if self.model.captioner is None:
            raise ValueError(f"{self.source} has no captioner; a model grown with captioner.depth has one")
        longest, tokenizer = min(longest, self.spec.text.context), self.tokenizer
        written = write(writing, self.model, self._pictures(images), tokenizer.START, tokenizer.END, longest)
        return [tokenizer.decode(ids) for ids in written]

    def _pictures(self, images: Tensor | Picture | Sequence[Picture]) -> Tensor:
        if not isinstance(images, Tensor):
            some: Sequence[Any] = list(images) if isinstance(images, list | tuple | Iterator) else [images]
            if not some:
                raise ValueError("there is no picture; give at least one")
            images = torch.stack([p if isinstance(p, Tensor) else self.preprocess(p) for p in some])
        images = images[None] if images.ndim == 3 else images
        side = self.spec.image.resolution
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != (3, side, side):
            raise ValueError(
                f"images are {str(images.dtype).removeprefix('torch.')} {list(images.shape)}; give uint8 "
                f"[b, 3, {side}, {side}], as `preprocess` makes them"
            )
        return images.to(self.device)


def load(
    source: str | Path,
    device: torch.device | str = "cpu",
    tokenizer: str | None = None,
    *,
    device_map: Literal["auto"] | None = None,
    max_memory: Memory | None = None,
    offload_folder: str | Path | None = None,
) -> Loaded:
    """The model at `source`: a commit's URL or a run folder, a folder that `treering export` wrote, or `open_clip:...`
    as for `treering import`; of a run that keeps an average of its weights, the average.

    tokenizer: a tokenizer.json for open_clip weights that do not use CLIP's.
    device_map: auto, for a model that may be larger than the device: blocks for which it has no room lie in the host's
    memory, and those for which that has none on the disk, below `offload_folder`; they are fetched when they are used.
    max_memory: with it, the most that the device and `cpu` may hold, as in {"cuda:0": "20GB", "cpu": "100GB"}; left
    out, what is free.

    Raises StoreError, InterchangeError or DataError where there is nothing to load, ValueError for a memory that cannot
    be, each saying what to give.
    """
    if device_map not in (None, "auto") or (device_map is None and (max_memory or offload_folder)):
        raise ValueError(f"device_map = {device_map!r} must be 'auto', or left out with max_memory and offload_folder")
    spec, tensors, text, name = _read(str(source), tokenizer)
    if device_map is None:
        return Loaded(_filled(spec, tensors, device), text, name)
    from .offloading import spread  # brings accelerate

    folder = None if offload_folder is None else Path(offload_folder)
    model, left = spread(spec, tensors, torch.device(device), max_memory, folder)
    return Loaded(model, text, name, left)


def _read(source: str, tokenizer: str | None) -> tuple[ModelSpec, dict[str, Tensor], TextTokenizer, str]:
    """Spec, weights by name, tokenizer and full name of what lies at `source`."""
    folder = Path(source)
    if not source.startswith(PREFIX) and (folder / "open_clip_config.json").is_file():
        source = f"{PREFIX}local-dir:{source}"
    if source.startswith(PREFIX):
        weights = open_weights(source)
        return weights.spec, weights.tensors, checked_tokenizer(weights, tokenizer), source
    if (folder / "spec.json").is_file() and (folder / "model.safetensors").is_file():
        from safetensors.torch import load_file

        spec = ModelSpec.model_validate_json((folder / "spec.json").read_text(encoding="utf-8"))
        recipe = json.loads((folder / "lineage.json").read_text(encoding="utf-8"))["recipe"]
        tensors = load_file(folder / "model.safetensors")
    else:
        commit = find_commit(source)
        spec, recipe = commit.manifest.spec, commit.manifest.recipe
        kind = "ema" if any(part.kind == "ema" for part in commit.manifest.parts) else "model"
        tensors = {path.partition("/")[2]: tensor for path, tensor in commit.tensors(kind).items()}
    name = tokenizer or recipe.get("data", {}).get("tokenizer", "clip")
    return spec, tensors, open_tokenizer(name), source


@torch.no_grad()
def _filled(spec: ModelSpec, tensors: dict[str, Tensor], device: torch.device | str) -> Model:
    """A model of these weights."""
    model = empty(spec)
    materialise(model, torch.device(device))
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[name])
    return model
