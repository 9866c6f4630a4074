"""A model from its spec: two towers, a learned temperature, and whatever other parts the spec has."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from .captioner import Captioner
from .mlp import Routing
from .output import Extras, ModelOutput, TowerOutput
from .parts import is_table, part_of, parts
from .shared import Shared
from .spec import ModelSpec
from .towers import ImageTower, ModalityTowers, TextTower, temperature
from .transformer import Transformer


class Model(nn.Module):
    """The trained model of a `ModelSpec`."""

    image_mean: Tensor
    image_std: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.image = ImageTower(spec.image, spec.embed_dim)
        self.text = TextTower(spec.text, spec.embed_dim)
        self.shared = Shared(spec) if spec.shared else None
        self.captioner = Captioner(spec) if spec.captioner else None
        self.modalities = ModalityTowers(spec.modalities, spec.embed_dim)
        # Shape [1]: sharded engines refuse 0-dimensional parameters.
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.logit_bias = nn.Parameter(torch.empty(1)) if spec.logit_bias else None
        self.in_bf16 = False
        """whether evaluation computes matrix products in bf16"""
        self.register_buffer("image_mean", torch.tensor(spec.image.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(spec.image.std).view(3, 1, 1), persistent=False)

    def computing(self) -> torch.autocast:
        """The context in which evaluation embeds: that of the model's training, if that was in bf16."""
        return torch.autocast(self.logit_scale.device.type, torch.bfloat16, enabled=self.in_bf16)

    def embed_images(self, images: Tensor, patches_bk: Tensor | None = None, pooled_only: bool = False) -> TowerOutput:
        """Embed pictures, uint8 [b, 3, resolution, resolution]; they are normalised on the device."""
        mean, std = self.image_mean.flatten(1), self.image_std.flatten(1)
        return self.image(images, mean, std, patches_bk, self.shared.image if self.shared else None, pooled_only)

    def embed_texts(self, tokens_t: Tensor, lengths_b: Tensor) -> TowerOutput:
        """Embed packed captions: int64 [t] ids, int64 [b] lengths."""
        return self.text(tokens_t, lengths_b, shared=self.shared.text if self.shared else None)

    @property
    def output_table(self) -> Tensor:
        """[v, d]: the captioner's states multiplied with it are next-token logits."""
        own = self.captioner and self.captioner.output
        return own.weight if own else self.text.token_embedding.weight

    def transformers(self) -> dict[str, Transformer]:
        """The transformer of every part, by the part's name."""
        modules = dict(self.named_modules())
        found = {part.name: modules[f"{part.name}.transformer"] for part in parts(self.spec)}
        return {name: module for name, module in found.items() if isinstance(module, Transformer)}

    def scale(self) -> Tensor:
        """The factor on cosine similarities, [1], from 1 to 100."""
        return temperature(self.logit_scale)

    def forward(self, images: Tensor, tokens_t: Tensor, lengths_b: Tensor, extras: Extras | None = None) -> ModelOutput:
        """Both towers, the captioner if there is one, and the towers of modalities that `extras` has samples for."""
        extras = extras or Extras()
        # A captioner, shared blocks and some objectives read all tokens, not the embeddings alone.
        pooled_only = self.captioner is None and self.shared is None and not extras.tokens
        image = self.embed_images(images, extras.patches_bk, pooled_only)
        shared = self.shared.text if self.shared else None
        text = self.text(tokens_t, lengths_b, pooled_only, shared, extras.longest)
        caption, of_captions = None, ()
        if self.captioner is not None:
            masked_b = extras.parallel_b
            read = text if masked_b is None else self.text.masked(text, lengths_b, masked_b, shared)
            caption, of_captions = self.captioner(image, read)
        modalities = {name: self.modalities[name](samples) for name, samples in extras.modalities.items()}
        both = tuple(map(Routing.plus, image.shared_routing, text.shared_routing))
        routing = (*image.routing, *text.routing, *both, *of_captions)
        routing += tuple(one for tower in modalities.values() for one in tower.routing)
        output = ModelOutput(image, text, self.scale(), self.logit_bias, caption, routing, modalities=modalities)
        if extras.tokens:
            tokens_bpe = self.image.project(image.tokens).unflatten(0, (len(images), -1))
            output = output._replace(image_tokens=tokens_bpe, text_tokens=self.text.project(text.tokens))
        return output


def named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for the stream `name` of a run's `seed`: the same on every machine and in any order of use."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@torch.no_grad()
def initialise(spec: ModelSpec, parameters: Iterable[tuple[str, Tensor]], seed: int) -> None:
    """Fill parameters of a model, given by name, with CLIP's scales, each from a random stream of its own name.

    Output projections are smaller by the square root of the number of writes into the residual stream, as in CLIP and
    GPT-2.
    """
    rows = {part.name: part for part in parts(spec)}
    for name, parameter in parameters:
        if name.endswith("logit_scale"):
            parameter.fill_(math.log(10.0 if spec.logit_bias and name == "logit_scale" else 1 / 0.07))
        elif name == "logit_bias":
            # Scale and bias start as in SigLIP (arXiv 2303.15343): nearly all pairs are negatives, so predict that.
            parameter.fill_(-10.0)
        elif parameter.ndim == 1 and name.endswith("_scale"):
            parameter.fill_(rows[part_of(name)].tower.layer_scale or 1.0)
        elif parameter.ndim == 1:
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        else:
            std = 0.02 if is_table(name) else parameter.shape[1] ** -0.5
            if name.endswith(("out.weight", "down.weight")):
                std *= rows[part_of(name)].writes ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=named_generator(seed, f"init/{name}")) * std)


def build(spec: ModelSpec, seed: int) -> Model:
    """A freshly initialised model on the CPU in fp32."""
    model = empty(spec)
    materialise(model, torch.device("cpu"))
    initialise(spec, model.named_parameters(), seed)
    return model


def empty(spec: ModelSpec) -> Model:
    """A model on the meta device: its tensors have shapes but no memory yet."""
    with torch.device("meta"):
        return Model(spec)


def materialise(model: Model, device: torch.device, wrapper: nn.Module | None = None) -> None:
    """Give the tensors of an empty model, or of the `wrapper` around it, memory on `device`.

    Constants are filled, parameters are not.
    """
    (wrapper or model).to_empty(device=device)
    _set_constants(model)


def built_by_module(model: Model, seed: int, device: torch.device) -> Iterator[nn.Module]:
    """Initialise an empty model module by module, and yield each module that has parameters.

    The caller may shard a module's parameters before it asks for the next, so that no more than one module is whole at
    a time.
    """
    for path, module in reversed(list(model.named_modules())):
        module.to_empty(device=device, recurse=False)
        own = [(f"{path}.{name}" if path else name, p) for name, p in module.named_parameters(recurse=False)]
        initialise(model.spec, own, seed)
        if module is model:
            _set_constants(model)
        if own:
            yield module


def _set_constants(model: Model) -> None:
    model.image_mean.copy_(torch.tensor(model.spec.image.mean).view(3, 1, 1))
    model.image_std.copy_(torch.tensor(model.spec.image.std).view(3, 1, 1))
