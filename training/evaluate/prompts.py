"""Class names and prompts of a zero-shot suite, in the formats of open_clip and CLIP_benchmark.

A file is text with one entry per line, or JSON: a list, or an object of lists by data set. A description set is JSON as
well: prompts by class. Labels are class numbers, in the order of the class names, or the names themselves.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data.errors import DataError, shown
from . import zero_shot
from .config import ZeroShot, check_templates

_LARGEST = 1 << 26  # bytes of a file


@dataclass(frozen=True)
class Prompts:
    """Texts, the class of each, and its weight in the class's mean."""

    texts: list[str]
    class_p: Tensor
    weight_p: Tensor


def class_names(protocol: ZeroShot) -> list[str] | None:
    """The class names by number; None if the labels are the names. Raises DataError if the file is not valid."""
    if protocol.classes is None:
        return None
    return _texts(protocol.classes, protocol.dataset, numbered=True)


def numbered(labels: Sequence[str], names: list[str] | None, url: str, file: str | None) -> tuple[list[str], Tensor]:
    """The class names, and each sample's class number, int64 [n]. Raises DataError for a label without a class."""
    found = sorted(set(labels))
    if names is None:
        if all(label.isdecimal() for label in found):
            raise DataError(f"the labels of {url} are numbers; give their class names as protocol.classes")
        return zero_shot.label_numbers(labels)
    if set(found) <= set(names):
        number = {name: i for i, name in enumerate(names)}
    elif all(label.isdecimal() for label in found):
        number = {label: int(label) for label in found}
        most = max(number.values())
        if most >= len(names):
            raise DataError(f"{url} has the label {most}, and {file} names {len(names)} classes, 0 to {len(names) - 1}")
    elif Path(url).is_dir() and len(found) == len(names):  # folders in alphabetical order, as torchvision numbers them
        number = {label: i for i, label in enumerate(found)}
    elif Path(url).is_dir():
        raise DataError(
            f"{url} has {len(found)} class folders, and {file} names {len(names)} classes; the numbers must be equal"
        )
    else:
        unknown = next(label for label in found if label not in names)
        raise DataError(f"{url} has the label {shown(unknown)}, which is not among the {len(names)} classes of {file}")
    return names, torch.tensor([number[label] for label in labels])


def prompts_of(protocol: ZeroShot, names: Sequence[str]) -> Prompts:
    """The prompts of every class. Raises DataError if a file is not valid."""
    if protocol.prompts is not None:
        return _described(protocol.prompts, names)
    templates = protocol.templates
    if isinstance(templates, str):
        file, templates = templates, tuple(_texts(templates, protocol.dataset))
        try:
            check_templates(templates, file)
        except ValueError as error:
            raise DataError(str(error)) from None
    count = len(templates)
    texts = zero_shot.prompts(names, templates)
    return Prompts(texts, torch.arange(len(names)).repeat_interleave(count), torch.ones(len(texts)))


def levels(file: str, names: Sequence[str]) -> list[list[str]]:
    """For each level of the hierarchy, the broader class of every class.

    A class whose chain is shorter keeps its last broader class. Raises DataError if the file is not valid.
    """
    above = _json(file)
    if not isinstance(above, dict) or not all(isinstance(each, str) for each in above.values()):
        raise DataError(f"{file} must be a JSON object of broader classes by class")
    chains = []
    for name in names:
        chain: list[str] = []
        while (at := chain[-1] if chain else name) in above:
            if above[at] in (name, *chain):
                raise DataError(f"{file}: {shown(above[at])} is broader than itself; remove the cycle")
            chain.append(above[at])
        if not chain:
            raise DataError(f"{file} has no broader class for {shown(name)}")
        chains.append(chain)
    return [[chain[min(level, len(chain) - 1)] for chain in chains] for level in range(max(map(len, chains)))]


def _described(file: str, names: Sequence[str]) -> Prompts:
    content = _json(file)
    if not isinstance(content, dict):
        raise DataError(f"{file} must be a JSON object of lists of prompts by class")
    texts, numbers, weights = [], [], []
    for number, name in enumerate(names):
        given = content.get(name)
        if not isinstance(given, list) or not given:
            raise DataError(f"{file} has no list of prompts for the class {shown(name)}")
        for each in given:
            text, weight = (each.get("text"), each.get("weight", 1)) if isinstance(each, dict) else (each, 1)
            fits = isinstance(weight, int | float) and not isinstance(weight, bool) and 0 < weight < 1e6
            if not isinstance(text, str) or not text.strip() or not fits:
                raise DataError(
                    f"{file}, class {shown(name)}: a prompt is a text, or an object with text and a weight above 0"
                )
            texts.append(text)
            numbers.append(number)
            weights.append(float(weight))
    return Prompts(texts, torch.tensor(numbers), torch.tensor(weights))


def _texts(file: str, dataset: str | None, numbered: bool = False) -> list[str]:
    """The texts of a file: its lines, a JSON list, or the list under `dataset` in a JSON object of lists. If they are
    `numbered`, none may be empty: leaving one out would move the numbers of those behind it."""
    if not file.endswith(".json"):
        lines = _read(file).replace("\r\n", "\n").replace("\r", "\n").rstrip().split("\n")
        texts = [line.strip() for line in lines]
    else:
        content = _json(file)
        if isinstance(content, dict):
            if dataset not in content:
                known = ", ".join(shown(key, 40) for key in list(content)[:8])
                raise DataError(f"{file} holds several data sets ({known}, ...); name one of them as protocol.dataset")
            content = content[dataset]
        if not isinstance(content, list) or not all(isinstance(each, str) for each in content):
            raise DataError(f"{file} must be a JSON list of texts, or an object of such lists")
        texts = [each.strip() and each for each in content]
    if not any(texts):
        raise DataError(f"{file} is empty; write one text per line, or a JSON list of texts")
    if numbered and not all(texts):
        raise DataError(
            f"{file}: text {texts.index('') + 1} is empty, so the classes' numbers are not clear; write its name, "
            f"or remove the empty line"
        )
    return [text for text in texts if text]


def _json(file: str) -> Any:
    try:
        return json.loads(_read(file))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON: {ascii(str(error))[1:-1][:100]}") from None


def _read(file: str) -> str:
    try:
        with open(file, "rb") as stream:
            data = stream.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise DataError(f"{file} is larger than 64 MiB, too large for a list of prompts; check protocol's files")
        return data.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}; check protocol's files") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8: byte 0x{data[error.start]:02x} at {error.start}") from None
