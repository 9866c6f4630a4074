"""CLIP's tokenizer: byte-pair encoding with the same ids as open_clip's SimpleTokenizer on any text.

Why not the `tokenizers` library for everything (Split by CLIP's pattern, ByteLevel, the same merges): tried, it gives
different ids for 112 of 20,000 strings of random code points, as its Unicode tables differ from those of `regex`, and
for none of 20,000 strings of ordinary words; it takes 7.8 s for 20,000 texts, this module 6.3 s.

The text is cleaned as in open_clip (ftfy, HTML entities, white space, lower case) and split into words by CLIP's
pattern; the `tokenizers` library merges each word, and known words come from a cache. The vocabulary file is part of
the open_clip wheel and is found without importing open_clip, which would take seconds.
"""

from __future__ import annotations

import gzip
import html
import importlib.util
from collections.abc import Iterable
from functools import cache, lru_cache
from pathlib import Path
from typing import Protocol

import regex  # type: ignore[import-untyped,unused-ignore]
from tokenizers.models import BPE

from ..errors import DataError

START, END, VOCABULARY = 49406, 49407, 49408
_SPECIAL = {"<start_of_text>": START, "<end_of_text>": END}
# CLIP's words: contractions, runs of letters, single digits, runs of anything else that is not white space.
_WORDS = regex.compile(
    r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)
_REMEMBERED_WORDS, _LONGEST_REMEMBERED = 100_000, 100  # longer words hardly occur twice, and could fill the memory


class Tokenizer:
    """CLIP's tokenizer. Ids of special tokens: START, END."""

    START, END, VOCABULARY = START, END, VOCABULARY
    identity = "clip"

    def __init__(self) -> None:
        self._bpe, self._texts = _vocabulary()
        self._known: dict[str, list[int]] = {}

    def encode(self, caption: str, context: int) -> list[int]:
        """START, the caption's ids, END; a longer text is truncated to `context` ids, the last of them END."""
        ids = [START]
        for match in _WORDS.finditer(clean_text(caption)):
            ids += self._word(match.group())
            if len(ids) >= context:  # later words would be truncated
                break
        ids = [*ids, END][:context]
        ids[-1] = END
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, without special tokens; bytes that are not UTF-8 become U+FFFD."""
        text = b"".join(self._texts[i] for i in ids if 0 <= i < START)
        return text.decode("utf-8", errors="replace").strip()

    def _word(self, word: str) -> list[int]:
        known = self._known.get(word)
        if known is None:
            known = [_SPECIAL[word]] if word in _SPECIAL else self._merged(word)
            if len(self._known) >= _REMEMBERED_WORDS:
                self._known.clear()
            if len(word) <= _LONGEST_REMEMBERED:
                self._known[word] = known
        return known

    def _merged(self, word: str) -> list[int]:
        letters = _byte_letters()
        return [token.id for token in self._bpe.tokenize("".join(letters[b] for b in word.encode("utf-8")))]


def encode_truncated(tokenizer: TextTokenizer, caption: str, context: int) -> tuple[list[int], bool]:
    """The ids of `tokenizer.encode(caption, context)`, and whether the caption was truncated."""
    ids = tokenizer.encode(caption, context + 1)
    if len(ids) <= context:
        return ids, False
    return [*ids[: context - 1], ids[-1]], True


@lru_cache(maxsize=32)  # each caption is cleaned three times: for the empty check, its ids and its hash
def clean_text(text: str) -> str:
    """The cleaned text that is tokenised; captions with equal cleaned texts count as the same caption.

    As open_clip's `_clean_lower`: ftfy, HTML entities resolved twice, white space collapsed, lower case.
    """
    if not (text.isascii() and text.isprintable() and "&" not in text):  # otherwise they change nothing
        import ftfy  # slow import, needed by few captions

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


@cache
def _byte_letters() -> list[str]:
    """A visible letter for each byte (GPT-2's table): printable Latin-1 bytes map to themselves, the other 68, in
    order, to the letters from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + hidden.index(byte)) for byte in range(256)]


@cache
def _vocabulary() -> tuple[BPE, list[bytes]]:
    """The BPE model, and the bytes of each id. Ids: 256 bytes, 256 bytes that end a word, the merges, START, END."""
    letters = _byte_letters()
    # Visible bytes come first in CLIP's numbering, each group in rising order.
    singles = sorted(letters, key=lambda letter: (ord(letter) >= 256, ord(letter)))
    lines = gzip.decompress(_merges_file().read_bytes()).decode("utf-8").split("\n")
    merges = [(first, second) for first, second in (line.split() for line in lines[1 : VOCABULARY - 512 - 2 + 1])]
    tokens = [*singles, *(single + "</w>" for single in singles), *(first + second for first, second in merges)]
    model = BPE({token: i for i, token in enumerate(tokens)}, merges, end_of_word_suffix="</w>")
    values = {letter: byte for byte, letter in enumerate(letters)}
    texts = []
    for token in tokens:
        word, end = token.removesuffix("</w>"), b" " if token.endswith("</w>") else b""
        texts.append(bytes(values[letter] for letter in word) + end)
    return model, texts


def _merges_file() -> Path:
    spec = importlib.util.find_spec("open_clip")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / "bpe_simple_vocab_16e6.txt.gz"
        if path.is_file():
            return path
    raise DataError("CLIP's vocabulary is missing: it is part of open_clip; run `pip install open_clip_torch`")


class TextTokenizer(Protocol):
    """The tokenizer interface that the loader and the evaluation use."""

    @property
    def identity(self) -> str:
        """Equal for tokenizers that make the same ids of every text, wherever their file is."""
        ...

    @property
    def START(self) -> int:
        """The id that every text begins with."""
        ...

    @property
    def END(self) -> int:
        """The id that every text ends with."""
        ...

    @property
    def VOCABULARY(self) -> int:
        """The number of rows of an embedding table: the largest id plus one."""
        ...

    def encode(self, caption: str, context: int) -> list[int]:
        """START, the caption's ids, END; a longer text is truncated to `context` ids, the last of them END."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, without special tokens."""
        ...
