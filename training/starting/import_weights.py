"""Foreign weights as a commit, from which a run can start and which can be evaluated like any other commit.

The recipe in the manifest is one that could train the model on; the lineage says where the weights came from, and keeps
what only open_clip needs to know, for the way back.
"""

from __future__ import annotations

from typing import Any

import torch

from ...data.samples.clip_tokenizer import TextTokenizer
from ...data.samples.tokenizer import open_tokenizer
from ...data.shards.source import held_out
from ...models.flops import parameters
from ...models.interchange.errors import InterchangeError
from ...models.interchange.files import Weights
from ..checkpoint.commits import Commits
from ..checkpoint.config import InitFromConfig
from ..checkpoint.snapshot import Snapshot
from ..checkpoint.store import Store, StoreError
from ..logging.counting import Counting, no_counting
from ..recipe import Recipe
from ..state import Event, RunState
from ..world import World

BATCH, SAMPLES, WARMUP, RATE = 256, 1_000_000, 20_000, 1e-5
"""defaults of the recipe written with imported weights; to be adapted by the user"""


def checked_tokenizer(weights: Weights, name: str | None) -> TextTokenizer:
    """The tokenizer for imported weights; `name` as in data.tokenizer, None for CLIP's.

    Raises InterchangeError if it is not that of the weights as far as that can be seen, DataError if it cannot be read.
    """
    theirs = weights.tokenizer.get("hf_tokenizer_name")
    if theirs and name in (None, "clip"):
        raise InterchangeError(
            f"{weights.name} uses the tokenizer {theirs}; get the tokenizer.json of that model and name it: "
            f"--tokenizer FILE"
        )
    if not theirs and name not in (None, "clip"):
        raise InterchangeError(f"{weights.name} reads CLIP's tokens; leave --tokenizer {name} out")
    tokenizer = open_tokenizer(name or "clip")
    rows = weights.spec.text.vocabulary
    if rows < tokenizer.VOCABULARY:
        raise InterchangeError(
            f"{name} has {tokenizer.VOCABULARY} ids, and {weights.name} has rows for {rows}; "
            f"name the tokenizer.json that it was trained with"
        )
    end = weights.tokenizer.get("eos_id", 2) if weights.tokenizer.get("pool_type") == "eos" else None
    if (weights.tokenizer.get("tokenizer_kwargs") or {}).get("strip_sep_token"):
        end = 0  # what open_clip puts in the place of the token that ends a text
    if end is not None and end != tokenizer.END:
        raise InterchangeError(
            f"{name} ends a text with id {tokenizer.END}, and {weights.name} was trained with {end} there; "
            f"change the post-processor of the file to end with id {end}"
        )
    return tokenizer


def notes(weights: Weights) -> list[str]:
    """Notes for the user on what else was in the file, and how pictures and texts are preprocessed for the weights."""
    image, found = weights.spec.image, [*weights.notes]
    if image.resize == "squash":
        found.append("evaluation squashes pictures, as these weights were trained; training crops them")
    if image.interpolation != "bicubic":
        found.append(f"evaluation resizes pictures {image.interpolation}, as these weights want; training bicubic")
    if weights.tokenizer:
        found.append(
            "open_clip mends broken Unicode and HTML entities before it tokenises; the tokenizer here does not"
        )
    return found


def import_commit(
    weights: Weights,
    out: str,
    data: str | None = None,
    tokenizer: str | None = None,
    counting: Counting = no_counting,
) -> tuple[str, Recipe]:
    """Write `weights` as the first commit of a new store at URL `out`; returns its URL and a recipe to train it
    further.

    `data` is what the recipe trains on; None leaves that to be filled in. `counting` shows the progress. Raises
    InterchangeError, DataError, StoreError.
    """
    checked_tokenizer(weights, tokenizer)
    recipe = recipe_for(weights, data, tokenizer or "clip")
    commits = Commits(Store(out))
    if commits.names():
        raise StoreError(f"{out} has commits already; give a new place")
    attempt = commits.claim_attempt(f"import of {weights.source}")
    detail: dict[str, Any] = {"source": weights.source, "architecture": weights.name, "tokenizer": weights.tokenizer}
    event = Event(event="import", step=0, samples=0, detail=detail | {"parameters": parameters(weights.spec)})
    tensors = {f"model/{name}": tensor for name, tensor in weights.tensors.items()}
    state = RunState(attempt=attempt, lineage=(event,))
    written = recipe.model_dump(mode="json")
    alone = World(0, 1, torch.device("cpu"))
    with counting("parts of the commit written") as progress:
        name = commits.write(Snapshot(weights.spec, state, written, tensors, reason="import"), alone, progress)
    url = f"{commits.store.url}/{name}"
    return url, recipe.model_copy(update={"init_from": InitFromConfig(commit=url)})


def recipe_for(weights: Weights, data: str | None, tokenizer: str) -> Recipe:
    """A recipe whose model these weights are; without `data` its sources are to be filled in."""
    spec = weights.spec
    contrastive = {"weight": 1.0, "kind": "sigmoid" if spec.logit_bias else "softmax"}
    name = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in weights.name)[:64]
    return Recipe.model_validate(
        {
            "name": name.lstrip("._-") or "imported",
            "data": {"train": [{"source": data}] if data else [], "batch": BATCH, "tokenizer": tokenizer},
            "model": spec.model_dump(mode="json"),
            "objectives": {"contrastive": contrastive, "caption": {"weight": 2.0} if spec.captioner else None},
            "stages": [{"samples": SAMPLES}],
            "optimizer": {"lr": RATE},
            "schedule": {"warmup": WARMUP},
            "eval": {"suites": ["retrieval"] if data and held_out(data) else []},
        }
    )


def tokenizer_of(state: RunState) -> dict[str, Any]:
    """What the lineage keeps for an export to open_clip; empty if the weights were not imported."""
    found: dict[str, Any] = {}

    def look(events: Any) -> None:
        for event in events:
            detail = event["detail"]
            if event["event"] == "import":
                found.update(detail.get("tokenizer", {}))
            look(detail.get("lineage", ()))

    look([event.model_dump() for event in state.lineage])
    return found
