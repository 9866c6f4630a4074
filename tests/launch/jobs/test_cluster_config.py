"""The site file: the example of docs/slurm.md is valid, and mistakes are refused with a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from treering.launch.errors import RecipeError
from treering.launch.jobs.cluster_config import Site, read_site

PAGE = Path(__file__).parents[3] / "docs" / "slurm.md"


def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> Site:
    (tmp_path / "site.yaml").write_text(text)
    monkeypatch.setenv("TREERING_SITE", str(tmp_path / "site.yaml"))
    return read_site()


def test_the_example_of_the_page_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = PAGE.read_text().split("## The site file")[1]
    block = section.split("\n\n")[2]
    read = site(tmp_path, monkeypatch, "\n".join(line.removeprefix("    ") for line in block.splitlines()))
    assert (read.partition, read.gpus_per_node, read.min_bandwidth, read.tasks) == ("main", 8, 20, "gpu")
    assert read.environment == {"NCCL_IB_HCA": "mlx5"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bandwith: 20", "bandwith"),
        ("options: [exclusive]", "'exclusive' is not an option of sbatch; write it as --name or --name=value"),
        ("environment: {a-b: x}", "'a-b' is not a valid name of a variable"),
        ("environment: {WANDB_API_KEY: x}", "WANDB_API_KEY looks like a secret"),
    ],
)
def test_a_mistake_is_refused(text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=words):
        site(tmp_path, monkeypatch, text)


def test_a_path_that_is_not_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREERING_SITE", str(tmp_path / "nowhere.yaml"))
    with pytest.raises(RecipeError, match="which is not a file; correct or unset it"):
        read_site()
