"""What a recipe's `checkpoint:` and `init_from:` blocks say."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

from pydantic import BaseModel, Field, field_validator

from ...data.config import Duration
from ...data.units import duration


class CheckpointConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """Where, how often and how long commits are kept. A run always commits before growth and at its end."""

    to: str | None = Field(None, description="any fsspec URL; default: the folder commits/ of the run")
    every: tuple[int | str, ...] = Field(
        ("2min",), strict=False, description="2min, 30s, 1h, a number of samples such as 10_000, or a list of these"
    )
    keep: int = Field(
        3, gt=0, description="newest commits to keep; those before a growth and the last healthy one are kept as well"
    )
    keep_every: int | None = Field(
        None, gt=0, description="samples; also keep the first commit in every interval of this length"
    )
    keep_best: str | None = Field(
        None,
        description="a score such as retrieval/image_to_text@1; also commit and keep the model with the best value",
    )
    wait_for_store: Duration = Field(
        "1h",
        description="how long the run tries again where it cannot go on without a commit (before a growth, at its end, "
        "after a signal) and the store fails; other commits are tried again while training continues",
    )
    max_bandwidth: float | None = Field(None, gt=0, description="upload limit of each process in MB/s; default: none")
    staging: str | None = Field(
        None,
        description="a folder on the node's own disk where a snapshot waits for its upload, for stores so slow that it "
        "would fill the memory; default: it waits in memory",
    )

    @field_validator("every", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return value if isinstance(value, list | tuple) else (value,)

    @field_validator("every")
    @classmethod
    def _readable(cls, value: tuple[int | str, ...]) -> tuple[int | str, ...]:
        for item in value:
            fits = item > 0 if isinstance(item, int) else duration(item) is not None
            if not fits:
                raise ValueError(
                    f"{item!r} is not a valid interval; write a time such as 30s, 2min or 1h, or samples such as 10_000"
                )
        return value

    def best_of(self, scores: Mapping[str, float], undefined: Collection[str]) -> float | None:
        """The value of the score that `keep_best` names; None if it names none, if its suite did not run (captioning,
        before the model has a captioner), or if it is `undefined`. Raises ValueError if its suite has no such score."""
        name = self.keep_best
        if name is None or name in undefined:
            return None
        suite = name.partition("/")[0]
        if name not in scores and (there := [each for each in scores if each.partition("/")[0] == suite]):
            raise ValueError(f"checkpoint.keep_best = {name!r} is not a score of {suite}; there are {', '.join(there)}")
        return scores.get(name)

    @property
    def patience(self) -> float:
        """`wait_for_store` in seconds."""
        return duration(self.wait_for_store) or 0.0

    @property
    def every_samples(self) -> int | None:
        """The shortest interval in samples, if any is given."""
        return min((i for i in self.every if isinstance(i, int)), default=None)

    @property
    def every_seconds(self) -> float | None:
        """The shortest interval in seconds, if any is given."""
        times = [duration(item) for item in self.every if isinstance(item, str)]
        return min((time for time in times if time is not None), default=None)


class InitFromConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """Where a new run begins. Once it has a commit of its own, it continues from that."""

    commit: str = Field(description="a commit's URL, or the newest one of a run folder")
    load: Literal["weights", "all"] = Field(
        "weights",
        description="weights: start at step 0 with these weights; all: continue at the commit's step, with its "
        "optimizer state",
    )
