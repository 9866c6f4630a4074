"""The tokenizer named in the recipe: CLIP's, or any Hugging Face tokenizer.json by path or URL.

The file defines how text is normalised and split. The model also needs one token that starts every text, from which the
captioner decodes, and one that ends it, at which the text tower pools. These are the tokens that the file's
post-processor adds around a text; without a post-processor, the special tokens with a common name. A file with an end
token but no start token uses the end token for both, as GPT-2 does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from hashlib import blake2b

import tokenizers

from ..errors import DataError, shown
from ..storage.files import readable_errors, shown_url
from ..storage.filesystems import filesystem
from .clip_tokenizer import VOCABULARY, TextTokenizer, Tokenizer

_MOST_BYTES = 1 << 28
_STARTS = ("<|startoftext|>", "<start_of_text>", "<|begin_of_text|>", "<bos>", "<s>", "[CLS]", "[BOS]")
_ENDS = ("<|endoftext|>", "<end_of_text>", "<|end_of_text|>", "<eos>", "</s>", "[SEP]", "[EOS]")
_ODD = "\U000e0fff\u0378q"  # in no vocabulary: encoding it needs an unknown token or byte tokens
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
        system, path = filesystem(name)
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
    return FileTokenizer(tokenizer, where, blake2b(data, digest_size=16).hexdigest())


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
        self._special = {self.START, self.END, self.PAD}

    def encode(self, caption: str, context: int) -> list[int]:
        """START, the caption's ids, END; a longer text is truncated to `context` ids, the last of them END."""
        ids = self._tokenizer.encode(caption, add_special_tokens=False).ids
        return [self.START, *ids[: max(0, context - 2)], self.END][:context]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, without special tokens and ids outside the vocabulary."""
        text = self._tokenizer.decode([i for i in ids if 0 <= i < self.VOCABULARY and i not in self._special])
        return str(text).strip()


def _around(tokenizer: tokenizers.Tokenizer, where: str) -> tuple[int, int]:
    """The ids that start and end a text. Raises DataError."""
    try:
        tokenizer.encode(_ODD)
        encoded = tokenizer.encode("a")
    except Exception as error:
        raise DataError(
            f"{where} cannot encode every text ({ascii(str(error))[1:-1][:100]}); give its model an unknown token"
        ) from None
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
