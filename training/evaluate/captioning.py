"""Scores of generated captions against the true ones: BLEU by sacrebleu, CIDEr by pycocoevalcap.

Both packages are optional (`treering[captioning]`; pycocoevalcap is 100 MB). COCO's evaluation tokenizes with a Java
program; here sacrebleu's 13a tokenizer does it, on lower-case text, without punctuation for CIDEr, so scores agree with
COCO's to a few tenths of a point. METEOR and SPICE only exist in Java and are not computed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...data.errors import DataError
from ...data.evaluation_sets import Pictures
from ...data.shards.parallel import Progress, silent
from ...models.model import Model
from ..world import World
from .embed import own_batches, pixels, read
from .generate import CaptionDecoding, write

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU

_DRAWS = 1000


def write_captions(
    model: Model,
    data: Pictures,
    decoding: CaptionDecoding,
    longest: int,
    batch: int,
    world: World,
    progress: Progress = silent,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Number, key, true captions and generated caption of every usable sample, and ledger entries for the others.

    Both are in index order. The work is distributed over the ranks; each returns all of it.
    """
    rows, bad = [], []
    tokenizer, longest = data.tokenizer, min(longest, model.spec.text.context)
    for numbers in own_batches(range(len(data)), batch, world, progress):
        samples, unusable = read(data, numbers)
        bad += unusable
        if not samples:
            continue
        ids = write(decoding, model, pixels(samples.values(), world), tokenizer.START, tokenizer.END, longest)
        rows += [
            {"number": number, "key": sample.key, "true": list(sample.captions), "written": tokenizer.decode(one)}
            for (number, sample), one in zip(samples.items(), ids, strict=True)
        ]
    gathered = [sorted((row for rank in world.objects(own) for row in rank), key=_number) for own in (rows, bad)]
    return gathered[0], gathered[1]


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, tuple[float, float]]:
    """BLEU-4 of the corpus (Papineni et al. 2002) as a fraction, and its bootstrap interval."""
    most = max(map(len, references))
    columns: list[list[str | None]] = [[each[i] if i < len(each) else None for each in references] for i in range(most)]
    found = _bleu().corpus_score(list(texts), columns, n_bootstrap=_DRAWS)  # type: ignore[arg-type,unused-ignore]
    # sacrebleu has no public names for the mean and half width of its bootstrap.
    return found.score / 100, ((found._mean - found._ci) / 100, (found._mean + found._ci) / 100)


def ciders(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Tensor:
    """float64 [n]: CIDEr-D of each text (Vedantam et al. 2015), on the scale where papers multiply by 100."""
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError:
        raise _missing("pycocoevalcap") from None
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    words = Tokenizer13a()

    def plain(text: str) -> str:
        return " ".join(re.findall(r"\w+(?:['’-]\w+)*", words(text.lower())))

    true = {i: [plain(each) for each in some] for i, some in enumerate(references)}
    _, each = Cider().compute_score(true, {i: [plain(text)] for i, text in enumerate(texts)})
    return torch.tensor(each, dtype=torch.float64)


def _bleu() -> BLEU:
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise _missing("sacrebleu") from None
    return BLEU(lowercase=True, tokenize="13a", force=True)  # else captions that end in " ." are warned of


def check_installed(metrics: Sequence[str]) -> None:
    """Raises DataError if a package for one of the metrics is missing."""
    from importlib.util import find_spec

    for metric, package in (("bleu", "sacrebleu"), ("cider", "pycocoevalcap"), ("cider", "sacrebleu")):
        if metric in metrics and find_spec(package) is None:
            raise _missing(package)


def _missing(package: str) -> DataError:
    return DataError(f"captioning needs the package {package}: pip install 'treering[captioning]'")


def _number(row: dict[str, Any]) -> int:
    number: int = row["number"]
    return number
