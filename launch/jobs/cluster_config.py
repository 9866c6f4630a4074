"""The site file: settings of one cluster that apply to every job and belong in no recipe.

It is `$TREERING_SITE` or ~/.config/treering/site.yaml, with defaults of `treering submit`, shell lines to run first
(module loads), environment variables, and the command that enters a container. Its shell lines are trusted; its
variables are checked for secrets. Everything else that goes into the batch script matches a pattern or is quoted.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, ValidationError, field_validator

from ...data.storage.credentials import holds_secret, is_secret_name
from ...models.wording import first_mistake
from ..errors import RecipeError, safe_text, show
from ..recipe.yaml_lines import read_yaml

WORD = r"^[A-Za-z0-9_][A-Za-z0-9_.,:/+=@&|*\[\]()-]{0,255}$"
OPTION = r"^--?[A-Za-z][A-Za-z0-9-]*(=[A-Za-z0-9_.,:/+=@%^~-]{0,1000})?$"
TIME = r"^(\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2})$"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Site(BaseModel, frozen=True, extra="forbid", strict=True):
    """The fields of the site file."""

    partition: str | None = Field(None, pattern=WORD)
    account: str | None = Field(None, pattern=WORD)
    qos: str | None = Field(None, pattern=WORD)
    constraint: str | None = Field(None, pattern=WORD)
    time: str | None = Field(None, pattern=TIME, description="as Slurm writes it: 30, 2:00:00, 1-00:00:00")
    gpus_per_node: int | None = Field(None, ge=0)
    options: tuple[str, ...] = Field(
        ("--exclusive", "--mem=0"), strict=False, description="additional options of sbatch, one a line"
    )
    setup: tuple[str, ...] = Field((), strict=False, description="shell lines to run first: module load cuda")
    environment: dict[str, str] = Field(default_factory=dict, description="variables, as in {NCCL_IB_HCA: mlx5}")
    srun: tuple[str, ...] = Field(
        (), strict=False, description="options of srun, such as those of pyxis: --container-image=/images/treering.sqsh"
    )
    inside: tuple[str, ...] = Field(
        (), strict=False, description="words before the command: [apptainer, exec, --nv, /images/treering.sif]"
    )
    tasks: Literal["node", "gpu"] = Field(
        "node", description="one srun task per node, which starts all its processes, or one per GPU, which Slurm binds"
    )
    min_bandwidth: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="GB/s that an all-reduce between the nodes must reach"
    )
    drain: bool = Field(
        False, description="set unfit nodes to DRAIN, where Slurm allows it; jobs exclude them in any case"
    )
    expand: int = Field(
        600, ge=0, description="seconds between looks for idle nodes, for a job that may use more (2-8); 0: never"
    )
    python: str | None = Field(
        None, description="the Python interpreter on the nodes; default: that of treering submit"
    )
    notice: int = Field(120, ge=10, lt=3600, description="seconds before the time limit at which a run commits")
    restarts: int = Field(100, ge=0, description="how often a job may requeue itself")

    @field_validator("options")
    @classmethod
    def _options(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for option in value:
            if not re.fullmatch(OPTION, option):
                raise ValueError(f"{show(option)} is not an option of sbatch; write it as --name or --name=value")
        return value

    @field_validator("setup", "srun", "inside")
    @classmethod
    def _without_credentials(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(map(holds_secret, value)):
            raise ValueError(
                "a line holds credentials inside a URL, and would be written to every batch script; use environment "
                "variables or a credentials file"
            )
        return value

    @field_validator("environment")
    @classmethod
    def _environment(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if not _NAME.fullmatch(name):
                raise ValueError(f"{show(name)} is not a valid name of a variable; use letters, digits and _")
            if is_secret_name(name) or holds_secret(text):
                raise ValueError(
                    f"{name} looks like a secret, and would be written to every batch script; "
                    f"use ~/.aws/credentials, or export it before treering submit"
                )
        return value


def read_site() -> Site:
    """Read the site file; the defaults if there is none. Raises RecipeError."""
    named = os.environ.get("TREERING_SITE")
    path = Path(named) if named else Path.home() / ".config" / "treering" / "site.yaml"
    if not path.is_file():
        if named:
            raise RecipeError(f"$TREERING_SITE names {show(named, 200)}, which is not a file; correct or unset it")
        return Site()
    try:
        tree, _ = read_yaml(path.read_text(encoding="utf-8"))
        return Site.model_validate(tree or {})
    except ValidationError as error:
        raise RecipeError(safe_text(f"{path}: {first_mistake(error, Site.model_fields)}")) from None
    except (UnicodeDecodeError, RecipeError) as error:
        raise RecipeError(f"{safe_text(str(path))}: {safe_text(str(error))}") from None
