"""The tokenizer named in the recipe: CLIP's, or any Hugging Face tokenizer.json by path or URL.

The file defines how text is normalised and split. The model also needs one token that starts every text, from which the
captioner decodes, and one that ends it, at which the text tower pools. These are the tokens that the file's
post-processor adds around a text; without a post-processor, the special tokens with a common name. A file with an end
token but no start token uses the end token for both, as GPT-2 does.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from functools import lru_cache
from hashlib import blake2b
from math import prod
from typing import Any

import tokenizers

from ..errors import BadSample, DataError, shown
from ..storage.files import readable_errors, shown_url
from ..storage.filesystems import single_try_filesystem
from .clip_tokenizer import VOCABULARY, TextTokenizer, Tokenizer

_MOST_BYTES = 1 << 28
_STARTS = ("<|startoftext|>", "<start_of_text>", "<|begin_of_text|>", "<bos>", "<s>", "[CLS]", "[BOS]")
_ENDS = ("<|endoftext|>", "<end_of_text>", "<|end_of_text|>", "<eos>", "</s>", "[SEP]", "[EOS]")
_ODD = "\U000e0fff\u0378q"  # in no vocabulary: encoding it needs an unknown token or byte tokens
_MOST_IDS = 1 << 24
_LONGEST_TEXT = 1 << 16  # characters of which a token is made at most
_MOST_GROWTH = 1_000
_MOST_SECONDS = 5.0  # for a text of a few thousand characters, which takes milliseconds
_HARD_TEXTS = (
    "a " * 400 + "!",
    "a" * 2000 + "!",
    " " * 2000 + "a",
    "1" * 2000 + "-",
    "(a" * 1000 + "$",
    "\n\t" * 1000 + "x",
)
_PADS = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>")


def vocabulary_size(name: str = "clip") -> int:
    """The number of rows that a tokenizer's embedding table needs. Raises DataError."""
    return VOCABULARY if name == "clip" else open_tokenizer(name).VOCABULARY


@lru_cache(maxsize=4)
def open_tokenizer(name: str = "clip") -> TextTokenizer:
    """The tokenizer `clip`, or the one in a tokenizer.json at a path or URL. Raises DataError."""
    if name == "clip":
        return Tokenizer()
    where = f"data.tokenizer: {shown_url(name)}"
    with readable_errors(name):
        system, path = single_try_filesystem(name)
        with system.open(path, "rb") as file:
            data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise DataError(f"{where} has more than {_MOST_BYTES:,} bytes; name a tokenizer.json")
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises bare Exceptions
        raise DataError(
            f"{where} is not a Hugging Face tokenizer ({ascii(str(error))[1:-1][:100]}); name a tokenizer.json"
        ) from None
    _check_growth(tokenizer, where)
    found = FileTokenizer(tokenizer, where, blake2b(data, digest_size=16).hexdigest())
    _check_patterns(tokenizer, where)
    return found


class FileTokenizer:
    """A Hugging Face tokenizer. Ids of special tokens: START, END, and PAD if there is one (batches are never
    padded)."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, where: str, identity: str) -> None:
        """`where` names the file in messages, `identity` is a hash of its content. Raises DataError without a token
        that ends a text."""
        self.identity = identity
        tokenizer.no_truncation()  # `encode` truncates
        self.PAD = _padding(tokenizer)
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.START, self.END = _around(tokenizer, where)
        self.VOCABULARY = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        if self.VOCABULARY > _MOST_IDS:
            raise DataError(f"{where} has the id {self.VOCABULARY - 1:,}; at most {_MOST_IDS - 1:,} is allowed")
        self._special = {self.START, self.END, self.PAD}

    def encode(self, caption: str, context: int) -> list[int]:
        """START, the caption's ids, END; a longer text is truncated to `context` ids, the last of them END. Of texts of
        more than 65,536 characters only those are read. Raises BadSample if the tokenizer fails at the text."""
        try:
            ids = _encoded(self._tokenizer, caption[:_LONGEST_TEXT], add_special_tokens=False).ids
        except _CannotEncode as error:
            raise BadSample(f"caption cannot be tokenized: {error}") from None
        return [self.START, *ids[: max(0, context - 2)], self.END][:context]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, without special tokens and ids outside the vocabulary."""
        text = self._tokenizer.decode([i for i in ids if 0 <= i < self.VOCABULARY and i not in self._special])
        return str(text).strip()


class _CannotEncode(Exception):
    """The library fails at a text; the message is its own, made safe."""


def _encoded(tokenizer: tokenizers.Tokenizer, text: str, **options: bool) -> Any:
    """`tokenizer.encode`; its panics, not subclasses of Exception, become _CannotEncode as its errors do."""
    try:
        return tokenizer.encode(text, **options)
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise _CannotEncode(ascii(str(error))[1:-1][:100]) from None


def _check_growth(tokenizer: tokenizers.Tokenizer, where: str) -> None:
    """Raises DataError if the replacements in a file could make a text many times longer than it is."""
    for part in (tokenizer.normalizer, tokenizer.decoder):
        if part is not None and (growth := _growth(json.loads(part.__getstate__()))) > _MOST_GROWTH:
            raise DataError(
                f"{where} replaces characters of a text by up to {growth:.3g} characters each; at most "
                f"{_MOST_GROWTH:,} are allowed, remove its Replace steps"
            )


def _growth(step: Any) -> float:
    """By how much a step of a normalizer or decoder may multiply the length of a text."""
    if isinstance(step, list):
        return prod(_growth(each) for each in step)
    if not isinstance(step, dict):
        return 1.0
    if step.get("type") == "Replace" and isinstance(content := step.get("content"), str):
        pattern = step.get("pattern")
        literal = pattern.get("String") if isinstance(pattern, dict) else None
        return max(1.0, len(content) / len(literal) if literal else len(content))
    return _growth([value for value in step.values() if isinstance(value, list | dict)])


def _check_patterns(tokenizer: tokenizers.Tokenizer, where: str) -> None:
    """Raises DataError if a regular expression of a file fails, or takes seconds, at texts of a few thousand
    characters."""
    for text in _HARD_TEXTS:
        begun = time.monotonic()
        try:
            _encoded(tokenizer, text)
        except _CannotEncode as error:
            raise DataError(
                f"{where} cannot encode a text of {len(text):,} characters ({error}); simplify its regular "
                f"expressions, or give its model an unknown token"
            ) from None
        seconds = time.monotonic() - begun
        if seconds > _MOST_SECONDS:
            raise DataError(
                f"{where} takes {seconds:.0f} seconds for a text of {len(text):,} characters; simplify its regular "
                f"expressions"
            )


def _around(tokenizer: tokenizers.Tokenizer, where: str) -> tuple[int, int]:
    """The ids that start and end a text. Raises DataError."""
    try:
        _encoded(tokenizer, _ODD)
        encoded = _encoded(tokenizer, "a")
    except _CannotEncode as error:
        raise DataError(f"{where} cannot encode every text ({error}); give its model an unknown token") from None
    words = [place for place, special in enumerate(encoded.special_tokens_mask) if not special]
    if words:
        before, after = encoded.ids[: words[0]], encoded.ids[words[-1] + 1 :]
    else:  # "a" has no token in this vocabulary: all ids are those added encoded the text
        half = len(encoded.ids) // 2
        before, after = encoded.ids[:half], encoded.ids[half:]
    if len(before) > 1 or len(after) > 1:
        found = ", ".join(shown(token, 30) for token in encoded.tokens[:6])
        raise DataError(
            f"{where} adds more than one token before or after a text ({found}); "
            f"configure its post-processor with one start and one end token"
        )
    start = before[0] if before else _named(tokenizer, _STARTS)
    end = after[0] if after else _named(tokenizer, _ENDS)
    if end is None:
        raise DataError(
            f"{where} has no token that ends a text; add one with its post-processor, or a special token "
            f"with a common name such as </s>"
        )
    return end if start is None else start, end


def _padding(tokenizer: tokenizers.Tokenizer) -> int | None:
    padding = tokenizer.padding
    return int(padding["pad_id"]) if padding else _named(tokenizer, _PADS)


def _named(tokenizer: tokenizers.Tokenizer, names: Sequence[str]) -> int | None:
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    return next((tokenizer.token_to_id(name) for name in names if name in special), None)
