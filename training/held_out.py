"""The held-out loss: every objective of a run on samples that it does not train on, beside the training loss.

A held-out batch goes where a training batch goes: as many pairs, divided over the ranks, through the model in the run's
precision, to the objectives with their weights. What differs is what regularises: pictures are centre crops without
augmentation, all patches are read, the caption is the first one. Each batch meets objectives that are built for it and
given the state of the run's own, so neither the order of batches nor a look at them changes anything. The samples are
the same at every evaluation, in runs of any seed and at any number of ranks: the first of a fixed permutation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import fsum
from typing import Any

import numpy as np
import torch

from ..data.loading.loader import EvaluationSet
from ..data.order import permuted, stable_hash
from ..data.samples.sample import Sample, collate
from ..data.shards.parallel import Progress
from ..data.storage.files import shown_url
from ..models.model import Model
from ..models.spec import ModelSpec
from .engines.device_prefetch import Feed
from .engines.micro_batches import PieceOutput, whole_output
from .evaluate.embedding_cache import Content
from .evaluate.outcome import Evaluation, HeldOutLoss
from .evaluate.protocols import Bench
from .objectives.base import Inputs, Objective, extras_of, load_states
from .objectives.terms import advance, build_objectives
from .recipe import Recipe
from .state import RunState
from .world import World

_ORDER = stable_hash("held-out loss")


@dataclass(frozen=True)
class Terms:
    """The loss of a run at a point of it."""

    recipe: Recipe
    """fixed: its stages are as the run decided them"""
    stage: int
    samples: int
    """samples trained on"""
    states: Mapping[str, dict[str, Any]]
    """states of the objectives, by name"""

    @classmethod
    def of(cls, recipe: Recipe, state: RunState, states: Mapping[str, dict[str, Any]]) -> Terms:
        """The loss of the run of `recipe` at `state`."""
        return cls(recipe.settled(state.decisions), state.stage, state.samples, states)

    def objectives(self, spec: ModelSpec) -> list[Objective]:
        """New objectives with the weights of the latest step and the states of the run's."""
        recipe = self.recipe
        built = build_objectives(recipe.objectives, spec, recipe.seed)
        advance(built, recipe.objectives, max(0, self.samples - recipe.data.batch) / recipe.total_samples)
        load_states(built, dict(self.states))
        return built

    def context(self, spec: ModelSpec) -> int:
        """Tokens of the longest caption: those of the stage."""
        return self.recipe.stages[self.stage].longest(spec)

    def json(self) -> list[Any]:
        """What a loss depends on beside the model and the samples."""
        recipe = self.recipe.model_dump(mode="json", include={"seed", "objectives", "data", "engine", "stages"})
        return [recipe, self.stage, self.samples, dict(self.states)]


def add_held_out_loss(bench: Bench, terms: Terms, url: str, wanted: int, found: Evaluation) -> None:
    """Add the loss on at least `wanted` samples of the set at `url`, or on all that make whole batches if it has fewer.

    A set of less than a batch is one smaller batch, and a note says so, as it does of terms that are left out. All
    ranks call it together and get the same result. Raises DataError, SpecError.
    """
    spec, columns = bench.model.spec, terms.recipe.data.columns
    data = bench.own_set(url, {*columns, *spec.modalities}, terms.context(spec))

    def make() -> Content:
        loss, notes = _Measured(bench, terms, data).loss(wanted)
        return {}, [loss and asdict(loss), notes]

    loss, notes = bench.cached(["held-out loss", data.identity, wanted, terms.json()], make)[1]
    found.held_out = HeldOutLoss(**loss) if loss else None
    found.notes += notes


class _Measured:
    """The held-out loss of a model on a set."""

    def __init__(self, bench: Bench, terms: Terms, data: EvaluationSet) -> None:
        self._bench, self._terms, self._data = bench, terms, data
        self._batch, self._alone = terms.recipe.data.batch, World(0, 1, bench.world.device)
        self._bad: set[int] = set()
        self._left_out: dict[str, str] = {}
        """objectives that cannot be computed on this set, with the column they lack"""

    def loss(self, wanted: int) -> tuple[HeldOutLoss | None, list[str]]:
        """The mean over the batches, and notes; None if no sample can be used, or no objective can be computed."""
        batch, name = self._batch, shown_url(self._data.url)
        batches = max(1, min(-(-wanted // batch), len(self._data) // batch))
        rows, samples = [], 0
        with self._bench.counting(f"{name}: samples of the held-out loss") as progress:
            for number in range(batches):
                row, pairs = self._of_batch(number * batch, progress, batches * batch)
                if row:
                    rows.append(row)
                    samples += pairs
        notes = [
            f"the held-out loss is without {term}: {name} has no column {column!r}"
            for term, column in self._left_out.items()
        ]
        if not rows:
            return None, [*notes, f"there is no held-out loss: {name} has no sample that it could be computed on"]
        if samples < batch:
            notes.append(
                f"{name} has {samples:,} usable samples, fewer than data.batch = {batch:,}: the held-out loss is of "
                f"one batch of {samples:,}, and a contrastive loss among fewer pairs is lower than in training"
            )
        losses = {term: fsum(row[term] for row in rows) / len(rows) for term in rows[0]}
        weights = {o.name: o.weight for o in self._terms.objectives(self._bench.model.spec)}
        used = {term: weights[term] for term in losses}
        return HeldOutLoss(losses, used, samples, min(batch, samples), name, sorted(self._left_out)), notes

    def _numbers(self, first: int) -> list[int]:
        """The samples of the batch that begins at place `first` of the order, without those that are known as bad."""
        size, end = len(self._data), first + self._batch
        places = np.arange(min(size, end + len(self._bad)))
        usable = [number for number in permuted(places, size, _ORDER).tolist() if number not in self._bad]
        return usable[first:end]

    def _of_batch(self, first: int, progress: Progress, total: int) -> tuple[dict[str, float], int]:
        """Each objective on the batch at `first`, and its number of pairs; nothing if the set ends before its end, and
        it is not the first."""
        world = self._bench.world
        read: dict[int, Sample] = {}
        while len(numbers := self._numbers(first)) == self._batch or (numbers and not first):
            share = world if len(numbers) % world.size == 0 else self._alone
            size = len(numbers) // share.size
            own = numbers[share.rank * size : (share.rank + 1) * size] if share is world or world.is_first else []
            bad = []
            for number in own:
                if number not in read:
                    sample = self._data.sample(number)
                    if isinstance(sample, Sample):
                        read[number] = sample
                    else:
                        bad.append(number)
                    progress(min(total, first + len(read) * share.size), total)
            new = [number for rank in world.objects(bad) for number in rank]
            if not new:
                parts = self._parts(first, [read[number] for number in own], share) if own else {}
                everyone = world.objects(parts)
                return {name: fsum(rank.get(name, 0.0) for rank in everyone) for name in everyone[0]}, len(numbers)
            self._bad.update(new)  # others take their places
        return {}, 0

    @torch.no_grad()
    def _parts(self, first: int, samples: list[Sample], share: World) -> dict[str, float]:
        """This rank's part of each objective on the batch at `first`, of which it has `samples`."""
        model, seed = self._bench.model, self._terms.recipe.seed
        inputs = Feed(share, seed)(collate(samples), first, 1.0, 0)
        objectives = [o for o in self._terms.objectives(model.spec) if self._is_fed(o, inputs)]
        if not objectives:
            return {}
        output, table = self._output(model, objectives, inputs, share)
        losses = {}
        for objective in objectives:
            try:
                losses[objective.name] = objective.partial_loss(output, inputs, table, share).item()
            except KeyError as error:
                if not self._lacks(error, inputs):
                    raise
                self._left_out[objective.name] = str(error.args[0])
        return losses

    def _is_fed(self, objective: Objective, inputs: Inputs) -> bool:
        """Whether the set has the columns of an objective's towers, and those it asks the model's outputs with."""
        lacking = min(objective.modalities - inputs.columns.keys(), default=None)
        if lacking is None:
            try:
                objective.extras(inputs)
            except KeyError as error:
                if not self._lacks(error, inputs):
                    raise
                lacking = str(error.args[0])
        if lacking is not None:
            self._left_out[objective.name] = lacking
        return lacking is None

    def _lacks(self, error: KeyError, inputs: Inputs) -> bool:
        """Whether an objective asked for a column that the run's data have and this set has not."""
        return bool(error.args) and error.args[0] in self._terms.recipe.data.columns.keys() - inputs.columns.keys()

    def _output(self, model: Model, objectives: list[Objective], inputs: Inputs, share: World) -> PieceOutput:
        """The model's output on this rank's pairs, in pieces of the evaluation's batch."""
        precision = self._terms.recipe.engine.precision

        def forward(piece: Inputs) -> PieceOutput:
            extras = extras_of(objectives, piece)
            with torch.autocast(share.device.type, torch.bfloat16, enabled=precision == "bf16"):
                return model(piece.images, piece.tokens, piece.lengths, extras), model.output_table

        pieces = -(-len(inputs.lengths) // self._bench.batch)
        return whole_output(forward, objectives, inputs, pieces, share)
