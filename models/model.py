"""A model from its spec: two towers, a learned temperature, and a captioner if the spec has one."""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .captioner import Captioner
from .spec import ModelSpec
from .towers import ImageTower, TextTower, TowerOutput

# The constants CLIP normalises pictures with (Radford et al., arXiv 2103.00020); weights are only portable with them.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_LOG_SCALE = math.log(100.0)


class Extras(NamedTuple):
    """What a forward pass is asked for beside its usual outputs."""

    tokens: bool = False
    """the tokens of both towers in the joint space"""
    parallel_b: Tensor | None = None
    """bool [b]: captions that the captioner sees masked, to predict all of their tokens at once; None: none"""
    patches_bk: Tensor | None = None
    """int64 [b, k]: patches of each picture that are looked at; None: all"""


class ModelOutput(NamedTuple):
    """Everything an objective may need of one forward pass."""

    image: TowerOutput
    text: TowerOutput
    scale: Tensor
    """[1]: multiplies cosine similarities"""
    bias: Tensor | None
    """[1]: added to scaled similarities by a sigmoid loss, or None if the model has none"""
    caption: Tensor | None
    """[t, d] states of the captioner in the text layout, or None without one"""
    image_tokens: Tensor | None = None
    """[b, p, e] in the joint space, if asked for"""
    text_tokens: Tensor | None = None
    """[t, e] in the joint space, if asked for"""


class Model(nn.Module):
    """The trained model of a `ModelSpec`."""

    image_mean: Tensor
    image_std: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.image = ImageTower(spec.image, spec.embed_dim)
        self.text = TextTower(spec.text, spec.embed_dim)
        self.captioner = Captioner(spec) if spec.caption else None
        # Shape [1]: sharded engines refuse 0-dimensional parameters.
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.logit_bias = nn.Parameter(torch.empty(1)) if spec.logit_bias else None
        self.register_buffer("image_mean", torch.tensor(IMAGE_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(IMAGE_STD).view(3, 1, 1), persistent=False)

    def embed_images(self, images: Tensor, patches_bk: Tensor | None = None) -> TowerOutput:
        """Embed uint8 pictures [b, 3, resolution, resolution]; they are normalised here, on the device."""
        return self.image((images.to(self.image_std.dtype) / 255 - self.image_mean) / self.image_std, patches_bk)

    def embed_texts(self, tokens_t: Tensor, lengths_b: Tensor) -> TowerOutput:
        """Embed packed captions: int64 [t] ids, int64 [b] lengths."""
        return self.text(tokens_t, lengths_b)

    def scale(self) -> Tensor:
        """The factor on cosine similarities, [1], at most 100."""
        return self.logit_scale.clamp(max=MAX_LOG_SCALE).exp()

    def forward(self, images: Tensor, tokens_t: Tensor, lengths_b: Tensor, extras: Extras | None = None) -> ModelOutput:
        """Both towers, and the captioner if there is one."""
        extras = extras or Extras()
        image = self.embed_images(images, extras.patches_bk)
        text = self.text(tokens_t, lengths_b, pooled_only=self.captioner is None and not extras.tokens)
        caption = None
        if self.captioner is not None:
            read = text if extras.parallel_b is None else self.text.masked(text, lengths_b, extras.parallel_b)
            caption = self.captioner(image, read)
        output = ModelOutput(image, text, self.scale(), self.logit_bias, caption)
        if extras.tokens:
            tokens_bpe = self.image.projection(image.tokens).unflatten(0, (len(images), -1))
            output = output._replace(image_tokens=tokens_bpe, text_tokens=self.text.projection(text.tokens))
        return output


def named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for the stream `name` of a run's `seed`: the same on every machine, in any order of use."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@torch.no_grad()
def initialise(model: Model, seed: int) -> None:
    """Fill the parameters with CLIP's scales, each from a stream of its own name.

    Matrices that write into a residual stream are smaller by the root of its number of writes, as in CLIP and GPT-2.
    """
    spec = model.spec
    writes = {"image": 2 * spec.image.depth, "text": 2 * spec.text.depth}
    writes["captioner"] = 3 * spec.caption.depth if spec.caption else 1
    for name, parameter in model.named_parameters():
        if name == "logit_scale":
            parameter.fill_(math.log(10.0 if spec.logit_bias else 1 / 0.07))
        elif name == "logit_bias":
            # Scale and bias start as in SigLIP (arXiv 2303.15343): nearly all pairs are negatives, and taken for such.
            parameter.fill_(-10.0)
        elif parameter.ndim == 1:
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        else:
            std = 0.02 if "embedding" in name else parameter.shape[1] ** -0.5
            if name.endswith(("out.weight", "down.weight")):
                std *= writes[name.split(".")[0]] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=named_generator(seed, f"init/{name}")) * std)


def build(spec: ModelSpec, seed: int) -> Model:
    """A freshly initialised model on the CPU in fp32."""
    with torch.device("meta"):
        model = Model(spec)
    model.to_empty(device="cpu")
    model.image_mean.copy_(torch.tensor(IMAGE_MEAN).view(3, 1, 1))
    model.image_std.copy_(torch.tensor(IMAGE_STD).view(3, 1, 1))
    initialise(model, seed)
    return model
