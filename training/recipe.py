"""The recipe: the whole description of a run, as typed, frozen, nested config objects.

Each block belongs to the part it configures and checks itself there; this module composes them and adds the checks
that need more than one block. Reading YAML and overrides is `treering.launch.recipe.load`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from math import isfinite
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, Field, model_validator

from ..data.config import DataConfig
from ..data.order import Mixture
from ..data.samples.tokenizer import vocabulary_size
from ..data.shards.source import held_out
from ..data.storage.files import shown_url
from ..data.units import counted
from ..models.spec import ModelSpec
from .checkpoint.config import CheckpointConfig, InitFromConfig
from .engines.config import DdpConfig, EngineConfig
from .engines.optimizer import OptimizerConfig
from .evaluate.config import EvalConfig
from .health.divergence import RecoveryConfig
from .health.watchdog import WatchdogConfig
from .objectives.terms import ObjectivesConfig, build_objectives, check_needs
from .schedule import ScheduleConfig, WsdConfig
from .stages import StageConfig
from .state import Decision


def _blended(new: Sequence[float], old: Sequence[float], replay: float) -> tuple[float, ...]:
    """A fraction `replay` of the mixture `old`, the rest of `new`."""
    share = Fraction(repr(replay))
    every = [[Fraction(repr(float(weight))) for weight in weights] for weights in (new, old)]
    return tuple(
        float((1 - share) * n / sum(every[0]) + share * o / sum(every[1])) for n, o in zip(*every, strict=True)
    )


def _floats(tree: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """The floats in plain data, by dotted path."""
    if isinstance(tree, float):
        yield path[1:], tree
    elif isinstance(tree, Mapping | list | tuple):
        for key, branch in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from _floats(branch, f"{path}.{key}")


class LogConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """How often a line goes to metrics.jsonl, TensorBoard and the terminal."""

    every: int = Field(10, gt=0, description="steps between two log lines")
    gradient_norms: bool = Field(False, description="also log each objective's gradient norm; a backward pass each")
    profile: bool = Field(False, description="trace steps 5 to 8 into trace-rank-N.json.gz of the run folder")


class Recipe(BaseModel, frozen=True, extra="forbid", strict=True):
    """A whole run."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="names the run folder: letters, digits, . _ -"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="every random stream of the run derives from it")
    data: DataConfig
    model: ModelSpec
    objectives: ObjectivesConfig
    stages: tuple[StageConfig, ...] = Field(min_length=1, strict=False, description="budgets, and growth between them")
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = WsdConfig()
    engine: EngineConfig = DdpConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    init_from: InitFromConfig | None = Field(None, description="the commit of another run to start from")

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_finite(cls, tree: Any) -> Any:
        """In every block at once: a limit such as gt=0 lets infinity pass."""
        for path, value in _floats(tree):
            if not isfinite(value):
                raise ValueError(f"{path} = {value} is not a finite number; give a number")
        return tree

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        captions = self.specs()[-1].captioner is not None  # a stage may add a captioner, none takes it away
        self.mixtures()
        if self.schedule.warmup >= self.total_samples:
            raise ValueError(
                f"schedule.warmup = {self.schedule.warmup} samples does not end before the run's {self.total_samples}; "
                f"set a smaller warmup or larger stages"
            )
        if self.eval.built_in and self.data.train and not self.evaluation_source:
            raise ValueError("eval.data is missing: name the shards to evaluate on, or set eval.suites to []")
        if self.eval.needs_captioner and not captions:
            raise ValueError("eval.suites has captioning, and the model no captioner; drop it, or add model.captioner")
        return self

    @model_validator(mode="after")
    def _the_best_is_scored(self) -> Self:
        name = self.checkpoint.keep_best
        suites = [*self.eval.built_in, *(suite.name for suite in self.eval.own)]
        if name is not None and name.partition("/")[0] not in suites:
            raise ValueError(
                f"checkpoint.keep_best = {name} is a score of no suite in eval.suites, which has "
                f"{', '.join(suites) or 'none'}; name one of theirs, such as retrieval/image_to_text@1"
            )
        return self

    @model_validator(mode="after")
    def _objectives_have_their_parts(self) -> Self:
        check_needs(self.objectives, self.specs()[-1])
        return self

    @model_validator(mode="after")
    def _modalities_are_fed_and_trained(self) -> Self:
        for number, spec in enumerate(self.specs()):
            trained = {name for objective in build_objectives(self.objectives, spec) for name in objective.modalities}
            for name in spec.modalities:
                if name not in self.data.columns:
                    raise ValueError(
                        f"model.modalities.{name} has nothing to read; add `{name}: npy` to data.columns, "
                        f"or drop the tower"
                    )
                if name not in trained:
                    raise ValueError(
                        f"model.modalities.{name} is not trained in stages.{number}; add `{{between: [{name}, text]}}` "
                        f"to objectives.modalities, or drop the tower"
                    )
        return self

    @model_validator(mode="after")
    def _gradients_need_the_whole_model(self) -> Self:
        if self.log.gradient_norms and not self.engine.measures_objectives:
            raise ValueError(
                f"log.gradient_norms = true does not work with engine.kind = {self.engine.kind}: the gradient of one "
                "objective needs the whole model on every process; set engine.kind: ddp, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _muon_needs_whole_matrices(self) -> Self:
        if self.optimizer.kind == "muon" and not self.engine.takes_muon:
            raise ValueError(
                f"optimizer.kind = muon does not work with engine.kind = {self.engine.kind}, which cuts the state in "
                "the middle of matrices, and Muon updates a matrix as a whole; set engine.kind: fsdp, or "
                "optimizer.kind: adamw"
            )
        return self

    @model_validator(mode="after")
    def _an_average_to_inherit_from(self) -> Self:
        number = next((i for i, stage in enumerate(self.stages) if stage.inherit == "ema"), None)
        if number is not None and self.optimizer.ema is None:
            raise ValueError(
                f"stages.{number}.inherit = ema takes new parts from the average of the weights, and the run keeps "
                f"none; set optimizer.ema: 0.999, or stages.{number}.inherit: 1.0"
            )
        return self

    @model_validator(mode="after")
    def _captions_can_be_cut(self) -> Self:
        for number, (stage, spec) in enumerate(zip(self.stages, self.specs(), strict=True)):
            if stage.context is None:
                continue
            if spec.text.padded:
                raise ValueError(
                    f"stages.{number}.context = {stage.context} would save nothing and move what is read: the text "
                    f"tower fills captions to its context; leave it out, or grow text.context"
                )
            if stage.context > spec.text.context:
                raise ValueError(
                    f"stages.{number}.context = {stage.context} cuts nothing, model.text.context is "
                    f"{spec.text.context}; leave it out, or set fewer tokens"
                )
        return self

    @model_validator(mode="after")
    def _a_plateau_is_left(self) -> Self:
        if self.stages[-1].plateau:
            raise ValueError(
                f"stages.{len(self.stages) - 1}.plateau ends the last stage early, and no stage follows that its "
                f"samples could go to; add a stage, or leave plateau out"
            )
        return self

    def settled(self, decisions: Sequence[Decision]) -> Recipe:
        """The recipe as a run has decided it so far: stages end where they ended, the budget is the same."""
        stages = list(self.stages)
        for made in decisions:
            if made.stage >= len(stages):  # another run's recipe, which is refused for its stages
                continue
            stage = stages[made.stage]
            if made.grow is not None:
                stages[made.stage] = stage.model_copy(update={"grow": made.grow, "search": None})
            if made.samples is not None and made.stage + 1 < len(stages):
                left = stage.steps(self.data.batch) * self.data.batch - made.samples
                following = stages[made.stage + 1]
                stages[made.stage] = stage.model_copy(update={"samples": made.samples})
                stages[made.stage + 1] = following.model_copy(update={"samples": following.samples + left})
        return self.model_copy(update={"stages": tuple(stages)})

    def commits_url(self, out: Path) -> str:
        """Where the commits of a run in folder `out` go: a local path or a URL."""
        return self.checkpoint.to or str(out / "commits")

    def specs(self) -> list[ModelSpec]:
        """The model's spec in each stage. Raises SpecError if a stage asks for a growth that cannot be."""
        specs, spec = [], self.model
        for stage in self.stages:
            spec = stage.resized(spec)  # refuses what cannot be
            specs.append(spec)
        return specs

    def mixtures(self) -> list[Mixture]:
        """The weights of the sources over the run, each from the step on at which they change. Raises ValueError."""
        sources = [source.label for source in self.data.train]
        twice = next((label for label in sources if sources.count(label) > 1), None)
        if twice is not None:
            raise ValueError(f"data.train has two sources called {twice!r}; give one of them another `name`")
        mixtures = [Mixture(0, tuple(source.weight for source in self.data.train))]
        step = 0
        for number, stage in enumerate(self.stages):
            unknown = next((name for name in stage.mixture if name not in sources), None)
            if unknown is not None:
                raise ValueError(
                    f"stages.{number}.mixture names {unknown!r}, which is not a source; there are {', '.join(sources)}"
                )
            weights = mixtures[-1].weights
            if stage.mixture:
                new = [stage.mixture.get(label, 0.0) for label in sources]
                weights = _blended(new, weights, stage.replay) if stage.replay else tuple(new)
            if weights != mixtures[-1].weights:
                mixtures = [mixture for mixture in mixtures if mixture.step < step] + [Mixture(step, weights)]
            step += stage.steps(self.data.batch)
        if self.data.train and not any(mixtures[0].weights):
            raise ValueError("every source of data.train has weight 0; give one of them more")
        idle = next(
            (label for label, *each in zip(sources, *(m.weights for m in mixtures), strict=True) if not any(each)), None
        )
        if idle is not None:
            raise ValueError(
                f"source {idle!r} is never read; give it a weight, name it in a stage's mixture or drop it"
            )
        return mixtures

    def newest(self, stage: int) -> Mixture:
        """The sources that a stage is the first to read, by their weights in it; all that it reads if none is new."""
        steps = [each.steps(self.data.batch) for each in self.stages]
        begin = sum(steps[:stage])
        read = [mixture.weights for mixture in self.mixtures() if mixture.step < begin]
        now = [mixture.weights for mixture in self.mixtures() if mixture.step <= begin][-1]
        new = tuple(w if not any(each[i] for each in read) else 0.0 for i, w in enumerate(now))
        return Mixture(0, new if any(new) else now)

    @property
    def evaluation_source(self) -> str:
        """URL of the shards to evaluate on; empty if there are none."""
        return self.eval.data or next((held_out(each.source) for each in self.data.train[:1]), None) or ""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return sum(stage.steps(self.data.batch) for stage in self.stages)

    @property
    def total_samples(self) -> int:
        """Samples of the whole run; each stage is rounded up to whole batches."""
        return self.total_steps * self.data.batch

    def check_tokenizer(self) -> None:
        """Raises ValueError if an id of the tokenizer has no row in the model's token table, DataError if its file
        cannot be read. (Not a validator: a recipe can be looked at where the file is not.)"""
        needed, rows = vocabulary_size(self.data.tokenizer), self.model.text.vocabulary
        if rows < needed:
            raise ValueError(
                f"model.text.vocabulary = {rows} has no row for some of the {needed} ids of "
                f"data.tokenizer = {shown_url(self.data.tokenizer)}; set model.text.vocabulary: {needed} or more"
            )

    def check_world(self, world: int) -> None:
        """Raises ValueError if `world` processes cannot share the global batch evenly."""
        batch = self.data.batch
        if batch % world:
            fitting = [w for w in range(1, batch + 1) if batch % w == 0]
            below = max(w for w in fitting if w < world)
            above = next((w for w in fitting if w > world), None)
            nearest = f"{below} or {above}" if above else str(below)
            raise ValueError(
                f"{counted(world, 'process')} cannot share data.batch = {batch} evenly; start {nearest} processes, "
                f"or set data.batch: {batch - batch % world or world}"
            )
        self.engine.check_world(world)
