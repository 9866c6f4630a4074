"""The parts of a model: one table, with a row a part, that everything walks which counts, draws or grows a model.

A part is a transformer with what stands before and after it: a tower, the captioner, the blocks that both towers share,
a tower of another modality. Its row says how its tensors are named, how large its blocks are, what flows through them
for a given batch, and what it has outside of its blocks. FLOPs, parameters, activations, initialisation and growth read
these rows, so a new kind of part is one function here and one module in `model.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from .spec import CaptionerSpec, ModalitySpec, ModelSpec, SharedSpec, TowerSpec

_GROUPS = ("modalities",)
"""fields of a ModelSpec that hold parts by name"""
_CONTINUES = {"captioner": "text"}
"""parts whose blocks work on the stream of another part"""


def part_of(name: str) -> str:
    """The part that tensor `name` belongs to: `image`, `captioner`, `modalities.audio`."""
    part, *path = name.split(".")
    return f"{part}.{path[0]}" if part in _GROUPS else part


def stream_of(name: str) -> str:
    """The part whose stream, heads and hidden units tensor `name` is shaped by: `text` for the captioner's."""
    part = part_of(name)
    return _CONTINUES.get(part, part)


def is_table(name: str) -> bool:
    """Whether tensor `name` is a lookup table: token, position or class embeddings."""
    return name.removesuffix(".weight").endswith("_embedding")


def is_temperature(name: str) -> bool:
    """Whether tensor `name` is the logarithm of a temperature: the model's, or that of a modality's tower."""
    return name.rpartition(".")[2] == "logit_scale"


class BatchShape(NamedTuple):
    """What of a batch decides over the work and the memory it takes."""

    pairs: float
    tokens: float
    """of all captions together"""
    cells: float
    """cells of the grid in which captions attend, pairs x longest; as many as tokens if they attend without padding"""
    patches: int | None = None
    """of each picture that the image tower sees; None: all"""
    half: bool = False
    """whether matrix products are computed in 16 bits"""
    reads_tokens: bool = False
    """whether an objective reads the tokens of pictures and captions in the joint space"""


class Pass(NamedTuple):
    """What one pass through a part's blocks works on, per sample."""

    tokens: float
    attended: float
    """keys that a token sees, on average"""
    cells: float = 0.0
    """cells of the attention grid; 0: as many as tokens"""
    memory: float = 0.0
    """image tokens that the blocks also attend to"""
    one_row: bool = False
    """whether the last block computes only the token that the embedding is read from"""


@dataclass(frozen=True)
class Part:
    """A row of the table."""

    name: str
    """of its field in the spec, and prefix of its tensors: `image.depth`, `image.transformer.blocks`"""
    tower: TowerSpec
    """sizes of its blocks"""
    depth: int
    passes: Callable[[BatchShape], tuple[Pass, ...]]
    """shared blocks are passed twice, all others once"""
    products: Callable[[BatchShape], float]
    """multiply-adds per sample outside of its blocks"""
    parameters: int
    """trained numbers outside of its blocks and of the norm after them"""
    input_bytes: int = 0
    """of one sample on the device, as delivered and as the first layer reads it"""
    memory_width: int | None = None
    """channels of the image tokens that its blocks attend to; None: they do not"""
    crosses_after: bool = False
    """whether they do so after the MLP, with a norm and an MLP of their own (open_clip's CoCa)"""

    @property
    def stack(self) -> str:
        """Prefix of the names of its blocks' tensors."""
        return f"{self.name}.transformer.blocks"

    @property
    def writes(self) -> int:
        """How often its blocks add to the stream."""
        return self.depth * (2 + (self.memory_width is not None) + self.crosses_after)


def parts(spec: ModelSpec) -> list[Part]:
    """The table for a model of `spec`."""
    found = [_image(spec), _text(spec)]
    found += [_shared(spec, spec.shared)] if spec.shared else []
    found += [_captioner(spec, spec.captioner)] if spec.captioner else []
    return found + [_modality(spec, name, tower) for name, tower in spec.modalities.items()]


def _image(spec: ModelSpec) -> Part:
    image, e, pooled = spec.image, spec.embed_dim, spec.image.pool == "attention"

    def passes(batch: BatchShape) -> tuple[Pass, ...]:
        tokens = _patches(spec, batch) + image.class_token
        return (Pass(tokens, tokens, one_row=_only_pooled(spec, batch) and image.pool == "class"),)

    def products(batch: BatchShape) -> float:
        patches = _patches(spec, batch)
        stream = patches + image.class_token
        count = patches * 3 * image.patch**2 * image.width + spec.memory_width * e
        if batch.reads_tokens:
            count += _memory(spec, batch) * spec.memory_width * e
        if pooled:  # queries and output, keys and values, and the two products of attention
            count += 2 * e * (image.queries * e + stream * image.width + image.queries * stream)
        return count

    count = image.width * (3 * image.patch**2 + image.patch_bias + image.grid**2) + spec.memory_width * e
    count += 2 * image.width * (image.class_token + image.pre_norm)
    if pooled:  # attention, queries and two norms; the norm of its input takes the place of the tower's last
        count += attention_parameters(e, e, image.width) + e * (image.queries + 4)
    # Pixels are kept as uint8, normalised in fp32, and unfolded into patches in fp32.
    pixels = 3 * image.resolution**2
    return Part("image", image, image.depth, passes, products, count, input_bytes=pixels * (1 + 4 + 4))


def _text(spec: ModelSpec) -> Part:
    text, e = spec.text, spec.embed_dim

    def passes(batch: BatchShape) -> tuple[Pass, ...]:
        if text.padded:
            return (Pass(text.context, (text.context + 1) / 2 if text.causal else text.context),)
        # CoCa's class token follows the text and one token of padding (`TextTower`).
        more = 2 * (text.pool == "class")
        tokens, cells = batch.tokens / batch.pairs + more, batch.cells / batch.pairs + more
        return (Pass(tokens, (tokens + 1) / 2, cells, one_row=_only_pooled(spec, batch)),)

    def products(batch: BatchShape) -> float:
        rows = 1 + (batch.tokens / batch.pairs if batch.reads_tokens else 0)
        return rows * text.width * e

    count = text.width * (text.vocabulary + text.context + e) + e * text.projection_bias
    count += 2 * text.width * (text.pool == "class")
    return Part("text", text, text.depth, passes, products, count)


def _shared(spec: ModelSpec, shared: SharedSpec) -> Part:
    def passes(batch: BatchShape) -> tuple[Pass, ...]:
        pictures = _patches(spec, batch) + spec.image.class_token
        return Pass(pictures, pictures), _captions(batch)

    def products(batch: BatchShape) -> float:
        pictures, captions = passes(batch)
        return 2 * shared.width * (pictures.tokens * spec.image.width + captions.tokens * spec.text.width)

    # A map from each tower's width and one back, with biases, and a gate each.
    count = (2 * shared.width + 1) * (spec.image.width + spec.text.width) + 2 * (shared.width + 1)
    return Part("shared", shared, shared.depth, passes, products, count)


def _captioner(spec: ModelSpec, captioner: CaptionerSpec) -> Part:
    text = spec.text

    def passes(batch: BatchShape) -> tuple[Pass, ...]:
        return (_captions(batch)._replace(memory=_memory(spec, batch)),)

    def products(batch: BatchShape) -> float:
        predicted = batch.tokens / batch.pairs - 1
        return predicted * text.width * text.vocabulary

    return Part(
        "captioner",
        text,
        captioner.depth,
        passes,
        products,
        parameters=0 if captioner.tied_embeddings else text.vocabulary * text.width,
        memory_width=spec.memory_width,
        crosses_after=captioner.cross_attention == "after",
    )


def _modality(spec: ModelSpec, name: str, tower: ModalitySpec) -> Part:
    def passes(batch: BatchShape) -> tuple[Pass, ...]:
        return (Pass(tower.frames, tower.frames),)

    def products(batch: BatchShape) -> float:
        return tower.width * (tower.frames * tower.features + spec.embed_dim)

    # The map of frames with its bias, positions, projection and temperature.
    count = tower.width * (tower.features + 1 + tower.frames + spec.embed_dim) + 1
    sample = 8 * tower.frames * tower.features  # fp32, twice
    return Part(f"modalities.{name}", tower, tower.depth, passes, products, count, input_bytes=sample)


def attention_parameters(width: int, inner: int, memory_width: int) -> int:
    """Numbers of an attention from `width` channels to a memory of `memory_width`, with `inner` in all its heads."""
    return inner * (2 * width + 2 * memory_width + 3) + width


def _patches(spec: ModelSpec, batch: BatchShape) -> int:
    return batch.patches or spec.image.grid**2


def _memory(spec: ModelSpec, batch: BatchShape) -> int:
    """Image tokens of one picture that others may read."""
    return spec.image.queries - 1 if spec.image.pool == "attention" else _patches(spec, batch)


def _captions(batch: BatchShape) -> Pass:
    """Captions as they are, each token seeing itself and those before it."""
    tokens = batch.tokens / batch.pairs
    return Pass(tokens, (tokens + 1) / 2, batch.cells / batch.pairs)


def _only_pooled(spec: ModelSpec, batch: BatchShape) -> bool:
    """Whether nothing but the embeddings of the towers is read."""
    return not (spec.captioner or spec.shared or batch.reads_tokens)
