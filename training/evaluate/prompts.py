"""Class names and prompts of a zero-shot suite, in the formats of open_clip and CLIP_benchmark.

A file is text with one entry per line, or JSON: a list, or an object of lists by data set. A description set is JSON as
well: prompts by class. Labels are class numbers, in the order of the class names, or the names themselves.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data.errors import DataError, shown
from ...data.samples.templates import check_templates
from . import zero_shot
from .config import ZeroShot

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


@dataclass(frozen=True)
class Numbered:
    """The class names, each sample's class number (int64 [n]), and a note if folders were not paired by name."""

    names: list[str]
    label_n: Tensor
    note: str | None = None


def numbered(labels: Sequence[str], names: list[str] | None, url: str, file: str | None) -> Numbered:
    """The class of each sample: its label is a name of `file`, a name in another spelling, or a number.

    Class folders none of which is named in `file`, such as ImageNet's, are paired with its names in alphabetical order,
    as torchvision numbers them. Raises DataError for a label without a class.
    """
    found = sorted(set(labels))
    if names is None:
        if all(label.isdecimal() for label in found):
            raise DataError(f"the labels of {url} are numbers; give their class names as protocol.classes")
        return Numbered(*zero_shot.label_numbers(labels))
    note, number = None, {name: i for i, name in enumerate(names)}
    if not set(found) <= set(names):
        if all(label.isdecimal() for label in found):
            number = {label: int(label) for label in found}
            most = max(number.values())
            if most >= len(names):
                raise DataError(
                    f"{url} has the label {most}, and {file} names {len(names)} classes, 0 to {len(names) - 1}; "
                    f"add its name, or correct the label"
                )
        elif Path(url).is_dir() and {*map(_spelling, names)}.isdisjoint(map(_spelling, found)):
            number, note = _in_order(found, names, url, file)
        else:
            number = _by_spelling(found, names, url, file)
    return Numbered(names, torch.tensor([number[label] for label in labels]), note)


def _spelling(name: str) -> str:
    """A name without what folder names cannot or do not keep: case, and signs between words."""
    return "".join(each for each in unicodedata.normalize("NFKC", name).casefold() if each.isalnum()) or name


def _by_spelling(found: Sequence[str], names: Sequence[str], url: str, file: str | None) -> dict[str, int]:
    spelled: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        spelled.setdefault(_spelling(name), []).append(i)
    for label in found:
        there = {names[i] for i in spelled.get(_spelling(label), ())}
        if len(there) != 1 and label not in there:
            why = f"could be any of {', '.join(map(shown, sorted(there)))}" if there else "is not among"
            raise DataError(
                f"{url} has the label {shown(label)}, which {why} the {len(names)} classes of {file}; "
                f"write the name in {file} as the label is"
            )
    exact = {name: i for i, name in enumerate(names)}
    return {label: exact.get(label, spelled[_spelling(label)][-1]) for label in found}


def _in_order(found: Sequence[str], names: Sequence[str], url: str, file: str | None) -> tuple[dict[str, int], str]:
    if len(found) != len(names):
        raise DataError(
            f"{url} has {len(found)} class folders, none of them named in {file}, which names {len(names)} classes; "
            f"to pair them in alphabetical order there must be as many of each"
        )
    ends = ", ".join(f"{shown(found[i])} is {shown(names[i])}" for i in (0, -1))
    note = f"no class folder of {url} is named in {file}: paired in alphabetical order ({ends})"
    return {label: i for i, label in enumerate(found)}, note


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
        raise DataError(f'{file} must be a JSON object of broader classes by class, as in {{"beagle": "dog"}}')
    chains = []
    for name in names:
        chain: list[str] = []
        while (at := chain[-1] if chain else name) in above:
            if above[at] in (name, *chain):
                raise DataError(f"{file}: {shown(above[at])} is broader than itself; remove the cycle")
            chain.append(above[at])
        if not chain:
            raise DataError(f"{file} has no broader class for {shown(name)}; add one")
        chains.append(chain)
    return [[chain[min(level, len(chain) - 1)] for chain in chains] for level in range(max(map(len, chains)))]


def _described(file: str, names: Sequence[str]) -> Prompts:
    content = _json(file)
    if not isinstance(content, dict):
        raise DataError(
            f'{file} must be a JSON object of lists of prompts by class, as in {{"cat": ["a photo of a cat"]}}'
        )
    texts, numbers, weights = [], [], []
    for number, name in enumerate(names):
        given = content.get(name)
        if not isinstance(given, list) or not given:
            raise DataError(f"{file} has no list of prompts for the class {shown(name)}; add one")
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
        raise DataError(f"{file} is not JSON: {ascii(str(error))[1:-1][:100]}; correct it") from None


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
        raise DataError(
            f"{file} is not UTF-8: byte 0x{data[error.start]:02x} at {error.start}; save it as UTF-8"
        ) from None
