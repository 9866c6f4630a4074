"""Tokenizers from a file, against the `tokenizers` library used plainly on files that are trained here."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer as Theirs
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from treering.data import DataConfig, DataError, EvaluationSet, Loader, Tokenizer
from treering.data.errors import BadSample
from treering.data.samples.clip_tokenizer import encode_truncated
from treering.data.samples.tokenizer import FileTokenizer, open_tokenizer, vocabulary_size
from treering.launch.commands.eval import evaluate_commit
from treering.launch.errors import RecipeError
from treering.launch.recipe.load import read_recipe
from treering.training.evaluate.config import EvalConfig
from treering.training.evaluate.suites import evaluate
from treering.training.loop import train
from treering.training.world import World

TEXTS = [
    "a red dog on the grass", "two dogs play with a ball", "the ball is red", "schöne grüne Wiese, ein Hund",
    "a photo of a cat, sleeping", "it's the dog's ball & nobody else's", "1234 emoji 👩🏾‍🚒 and 日本語",
] * 5  # fmt: skip


def bpe(specials: list[str], post: Any = None) -> Theirs:
    """A byte-level BPE as GPT-2's: any text has ids and comes back from them."""
    tokenizer = Theirs(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if post:
        tokenizer.post_processor = post(tokenizer)
    return tokenizer


def wordpiece() -> Theirs:
    """As BERT's: lower case, unknown words, [CLS] and [SEP] by a post-processor."""
    tokenizer = Theirs(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def template(single: str) -> Callable[[Theirs], Any]:
    def make(tokenizer: Theirs) -> Any:
        names = [part for part in single.split() if part != "$A"]
        return processors.TemplateProcessing(single, special_tokens=[(n, tokenizer.token_to_id(n)) for n in names])

    return make


KINDS: dict[str, Callable[[], Theirs]] = {
    "wordpiece": wordpiece,
    "bpe": lambda: bpe(["<s>", "</s>", "<pad>"], template("<s> $A </s>")),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Theirs]]:
    folder, made = tmp_path_factory.mktemp("tokenizers"), {}
    for name, make in KINDS.items():
        tokenizer = make()
        tokenizer.enable_padding(pad_id=0, length=99)  # as files from the hub often have them: not for us
        tokenizer.enable_truncation(5)
        tokenizer.save(str(folder / f"{name}.json"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        made[name] = str(folder / f"{name}.json"), tokenizer
    return made


def check(ours: Any, theirs: Theirs, text: str, context: int = 77) -> None:
    whole = theirs.encode(text).ids
    ids = ours.encode(text, context)
    assert ids == (whole if len(whole) <= context else [*whole[: context - 1], whole[-1]])
    assert ours.decode(ids) == theirs.decode(whole if len(whole) <= context else ids).strip()


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_library(files: dict[str, tuple[str, Theirs]], kind: str) -> None:
    path, theirs = files[kind]
    ours = open_tokenizer(path)
    assert isinstance(ours, FileTokenizer)
    assert open_tokenizer(path) is ours
    assert ours.VOCABULARY == vocabulary_size(path) == theirs.get_vocab_size()
    for text in (*TEXTS[:7], "", " ", "\x00\x1b[2J", "&amp; <b>", "x" * 500, "word " * 200):
        for context in (2, 3, 16, 77, 5000):
            check(ours, theirs, text, context)
    assert ours.decode([*ours.encode("a dog", 9), ours.VOCABULARY, -1]) == "a dog"


@given(text=st.text(max_size=60), context=st.integers(2, 40))
@settings(max_examples=300, deadline=None)
def test_any_text(files: dict[str, tuple[str, Theirs]], text: str, context: int) -> None:
    for path, theirs in files.values():
        check(open_tokenizer(path), theirs, text, context)
        whole = open_tokenizer(path).encode(text, 10_000)
        assert encode_truncated(open_tokenizer(path), text, context) == (
            whole if len(whole) <= context else [*whole[: context - 1], whole[-1]],
            len(whole) > context,
        )
    clip = open_tokenizer()
    assert encode_truncated(clip, text, context) == (
        clip.encode(text, context),
        len(clip.encode(text, 10_000)) > context,
    )


def opened(tmp_path: Path, tokenizer: Theirs) -> FileTokenizer:
    tokenizer.save(str(tmp_path / "t.json"))
    open_tokenizer.cache_clear()
    made = open_tokenizer(str(tmp_path / "t.json"))
    assert isinstance(made, FileTokenizer)
    return made


@pytest.mark.parametrize(
    ("specials", "single", "around", "pad"),
    [
        (["<s>", "</s>", "<pad>"], "<s> $A </s>", ("<s>", "</s>"), "<pad>"),
        (["<|x|>", "<|y|>"], "<|x|> $A <|y|>", ("<|x|>", "<|y|>"), None),  # whatever their names
        (["<pad>", "</s>"], "$A </s>", ("</s>", "</s>"), "<pad>"),  # T5
        (["<s>", "</s>"], "<s> $A", ("<s>", "</s>"), None),  # Llama
        (["<|endoftext|>"], None, ("<|endoftext|>", "<|endoftext|>"), None),  # GPT-2
        (["<|startoftext|>", "<|endoftext|>"], None, ("<|startoftext|>", "<|endoftext|>"), None),
    ],
)
def test_start_and_end(
    tmp_path: Path, specials: list[str], single: str | None, around: tuple[str, str], pad: str | None
) -> None:
    theirs = bpe(specials, template(single) if single else None)
    ours = opened(tmp_path, theirs)
    assert tuple(map(theirs.token_to_id, around)) == (ours.START, ours.END)
    assert (theirs.token_to_id(pad) if pad else None) == ours.PAD
    inner = theirs.encode("a red dog", add_special_tokens=False).ids
    assert ours.encode("a red dog", 20) == [ours.START, *inner, ours.END]


def test_the_vocabulary_has_a_row_for_the_largest_id(tmp_path: Path) -> None:
    theirs = Theirs(models.WordLevel({"a": 0, "b": 900, "<s>": 901, "</s>": 902}, "a"))
    theirs.add_special_tokens(["<s>", "</s>"])
    assert opened(tmp_path, theirs).VOCABULARY == 903


def test_an_unknown_letter_a(tmp_path: Path) -> None:
    theirs = Theirs(models.BPE({"d": 0, "<s>": 1, "</s>": 2}, []))
    theirs.post_processor = template("<s> $A </s>")(theirs)
    ours = opened(tmp_path, theirs)
    assert ours.encode("dad", 5) == [1, 0, 0, 2]


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"data\.tokenizer: .* has no token that ends a text; add one with its post-processor"
    ):
        opened(tmp_path, bpe(["<s>"], template("<s> $A")))
    with pytest.raises(DataError, match=r"more than one token before or after a text \('<s>', '<s>', .*'</s>'\)"):
        opened(tmp_path, bpe(["<s>", "</s>"], template("<s> <s> $A </s>")))
    with pytest.raises(DataError, match=r"cannot encode every text \(.*UNK.*\); give its model an unknown token"):
        opened(tmp_path, Theirs(models.WordLevel({"a": 0})))
    for data in (b"", b"{}", b"not json", b"\xff\xfe", b"[" * 100_000, json.dumps({"model": {"type": "No"}}).encode()):
        (tmp_path / "x.json").write_bytes(data)
        open_tokenizer.cache_clear()
        with pytest.raises(DataError, match=r"is not a Hugging Face tokenizer \(.*\); name a tokenizer\.json$"):
            open_tokenizer(str(tmp_path / "x.json"))
    with pytest.raises(DataError, match="not found"):
        open_tokenizer(str(tmp_path / "none.json"))
    with pytest.raises(DataError, match="cannot read"):
        open_tokenizer(str(tmp_path))


def test_clip_is_the_default() -> None:
    ours = open_tokenizer()
    assert isinstance(ours, Tokenizer)
    assert open_tokenizer("clip") is not None
    assert vocabulary_size() == ours.VOCABULARY == 49408


# In a run


def write_shard(path: Path) -> str:
    with tarfile.open(path, "w") as tar:
        for n in range(12):
            file = io.BytesIO()
            Image.fromarray(np.full((16, 16, 3), 20 * n, np.uint8)).save(file, "PNG")
            metadata = {"labels": {"what": "dog" if n % 2 else "ball"}}
            for kind, data in (
                ("png", file.getvalue()),
                ("txt", TEXTS[n].encode()),
                ("json", json.dumps(metadata).encode()),
            ):
                info = tarfile.TarInfo(f"{n:02}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)


def test_the_loader_uses_it(tmp_path: Path, files: dict[str, tuple[str, Theirs]]) -> None:
    url, (path, theirs) = write_shard(tmp_path / "0.tar"), files["bpe"]
    config = DataConfig.model_validate({"train": [{"source": url}], "batch": 6, "tokenizer": path})
    with closing(Loader(config, 16, 9, 0).batches(0)) as batches:
        for batch in islice(batches, 4):
            rows = [row.tolist() for row in batch.tokens.split(batch.lengths.tolist())]
            whole = [theirs.encode(caption).ids for caption in batch.captions]
            assert rows == [ids if len(ids) <= 9 else [*ids[:8], ids[-1]] for ids in whole]
            assert batch.cut.tolist() == [len(ids) > 9 for ids in whole]
            assert {len(ids) for ids in rows} != {9}
    sample = EvaluationSet(url, 16, 9, tokenizer=path).sample(1)
    assert sample.tokens == open_tokenizer(path).encode(TEXTS[1], 9)  # type: ignore[union-attr]


def test_evaluation_uses_it(tmp_path: Path, files: dict[str, tuple[str, Theirs]]) -> None:
    """A model whose table ends where the file's ids do: any other tokenizer's would be out of range."""
    from treering.models.model import build
    from treering.models.spec import CaptionerSpec, ImageSpec, ModelSpec, TextSpec

    url, (path, theirs) = write_shard(tmp_path / "0.tar"), files["wordpiece"]
    spec = ModelSpec(
        embed_dim=8,
        image=ImageSpec(width=8, depth=1, heads=1, patch=8, resolution=16),
        text=TextSpec(width=8, depth=1, heads=1, context=9, vocabulary=theirs.get_vocab_size()),
        captioner=CaptionerSpec(depth=1),
    )
    model = build(spec, 0)
    seen = []
    embed = model.embed_texts
    model.embed_texts = lambda tokens, lengths: seen.append(tokens) or embed(tokens, lengths)  # type: ignore[method-assign]
    config = EvalConfig(suites=("retrieval", "zero_shot"), templates={"what": ("a photo of a {}",)}, examples=3)
    found = evaluate(model, config, url, World(0, 1, torch.device("cpu")), None, path)
    assert seen[0].tolist() == [i for text in TEXTS[:12] for i in open_tokenizer(path).encode(text, 9)]
    prompts = [i for name in ("ball", "dog") for i in theirs.encode(f"a photo of a {name}").ids]
    assert seen[1].tolist() == prompts
    for row in found.examples["captions"]:
        assert all(c.isprintable() for c in row["generated"])
        assert "[CLS]" not in row["generated"]


def test_a_commit_whose_tokenizer_is_gone(files: dict[str, tuple[str, Theirs]], tmp_path: Path) -> None:
    """It says which file is missing; with the file, the commit is evaluated with its ids."""
    path, theirs = files["bpe"]
    copy = tmp_path / "tokenizer.json"
    copy.write_bytes(Path(path).read_bytes())
    tiny = [
        f"data.tokenizer={copy}", f"data.train=[{{source: {write_shard(tmp_path / '0.tar')}}}]", "data.batch=4",
        "model.embed_dim=8", "model.image={width: 8, depth: 1, heads: 1, patch: 8, resolution: 16}",
        f"model.text={{width: 8, depth: 1, heads: 1, context: 9, vocabulary: {theirs.get_vocab_size()}}}",
        "model.captioner.depth=1", "schedule.warmup=4", "stages=[{samples: 8}]", "eval.suites=[]",
    ]  # fmt: skip
    train(read_recipe("emoji", tiny).recipe, tmp_path / "run")
    found = evaluate_commit(str(tmp_path / "run"), ["retrieval"], str(tmp_path / "0.tar"))
    assert found["sizes"] == {"retrieval": 7, "retrieval/text_to_image": 12}  # 7 different captions
    copy.unlink()
    open_tokenizer.cache_clear()
    with pytest.raises(DataError, match=r"tokenizer\.json: not found; check the path"):
        evaluate_commit(str(tmp_path / "run"), ["retrieval"], str(tmp_path / "0.tar"))


def test_the_recipe_checks_it(files: dict[str, tuple[str, Theirs]], tmp_path: Path) -> None:
    path, theirs = files["bpe"]
    size = theirs.get_vocab_size()
    recipe = read_recipe("emoji", [f"data.tokenizer={path}", f"model.text.vocabulary={size}"]).recipe
    assert recipe.model.text.vocabulary == size
    read_recipe("emoji", [f"data.tokenizer={path}"])  # more rows than ids
    with pytest.raises(RecipeError) as error:
        read_recipe("emoji", [f"data.tokenizer={path}", f"model.text.vocabulary={size - 1}"])
    assert (
        f"model.text.vocabulary = {size - 1} has no row for some of the {size} ids of data.tokenizer = {path}; "
        f"set model.text.vocabulary: {size} or more"
    ) in " ".join(str(error.value).split())
    with pytest.raises(RecipeError, match=r"data\.tokenizer = clip; *set model\.text\.vocabulary: 49408 or more"):
        read_recipe("emoji", ["model.text.vocabulary=400"])
    with pytest.raises(RecipeError, match="not found"):
        read_recipe("emoji", [f"data.tokenizer={tmp_path / 'none.json'}"])


# Hostile files


def plain_file(path: Path, **changes: Any) -> str:
    """A tokenizer.json of three words, with changes."""

    def special(number: int, content: str) -> dict[str, Any]:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        return {"id": number, "content": content, "special": True, **flags}

    words = {"<s>": 0, "</s>": 1, "<unk>": 2}
    file = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": None,
        "post_processor": None, "decoder": None, "added_tokens": [special(n, word) for word, n in words.items()],
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }  # fmt: skip
    path.write_text(json.dumps(file | changes), encoding="utf-8")
    return str(path)


def replaced(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
BOMB = {**SPLIT, "pattern": {"Regex": r"(([a-z ]+)+)+\$1"}}
TIMES_50, TIMES_40 = replaced({"String": "a"}, "a" * 50), replaced({"Regex": "."}, "a" * 40)
HOSTILE_FILES = {
    "a pattern that fails": ({"pre_tokenizer": BOMB}, "cannot encode a text"),
    "growth": ({"normalizer": {"type": "Sequence", "normalizers": [TIMES_50] * 6}},
               r"by up to 1\.56e\+10 characters each; at most 1,000"),
    "growth by a pattern": ({"normalizer": {"type": "Sequence", "normalizers": [TIMES_40] * 2}},
                            r"by up to 1\.6e\+03 characters"),
    "growth of the decoder": ({"decoder": {"type": "Sequence", "decoders": [TIMES_50] * 6}}, "by up to"),
    "an id": ({"model": {"type": "WordLevel", "vocab": {"<s>": 0, "</s>": 1, "<unk>": 2, "z": 2**32 - 1},
                         "unk_token": "<unk>"}}, "has the id 4,294,967,295"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE_FILES)
@pytest.mark.timeout(60)
def test_a_hostile_file_is_refused_before_a_text_is_read(tmp_path: Path, kind: str) -> None:
    changes, words = HOSTILE_FILES[kind]
    with pytest.raises(DataError, match=words) as error:
        open_tokenizer(plain_file(tmp_path / "tokenizer.json", **changes))
    assert "data.tokenizer: " in str(error.value)


def test_replacements_that_hardly_grow_are_fine(tmp_path: Path) -> None:
    steps = [replaced({"String": "``"}, '"'), replaced({"Regex": " {2,}"}, " "), replaced({"String": " "}, "▁"),
             {"type": "Prepend", "prepend": "▁"}, {"type": "NFKC"}] * 9  # fmt: skip
    name = plain_file(tmp_path / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": steps})
    assert open_tokenizer(name).encode("a", 8) == [0, 2, 1]


def test_a_text_at_which_the_library_panics_is_a_bad_sample(tmp_path: Path) -> None:
    """A text that the probes do not foresee; and only the beginning of a very long one is read."""
    found = open_tokenizer(plain_file(tmp_path / "tokenizer.json"))
    assert isinstance(found, FileTokenizer)
    read = []

    class PanicException(BaseException):
        """Not an Exception, as pyo3's."""

    class Panics:
        def encode(self, text: str, add_special_tokens: bool) -> Any:
            read.append(len(text))
            raise PanicException("attempt to\x1b subtract")

    found._tokenizer = Panics()
    with pytest.raises(BadSample, match=r"^caption cannot be tokenized: attempt to\\x1b subtract$"):
        found.encode("x" * 1_000_000, 77)
    assert read == [65_536]
