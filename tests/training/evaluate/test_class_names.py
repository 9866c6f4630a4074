"""Labels and the names of classes find each other by what they say, never by where they happen to be sorted."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treering.data.errors import DataError
from treering.training.evaluate.prompts import numbered


def classes(labels: list[str], names: list[str], url: str = "shards.tar") -> list[str]:
    """The class of each label."""
    found = numbered(labels, names, url, "classes.txt")
    return [found.names[i] for i in found.label_n]


@pytest.mark.parametrize("folders", [True, False])
def test_labels_are_found_by_their_spelling(folders: bool, tmp_path: Path) -> None:
    """In the file's order, which is not that of the alphabet."""
    names = ["Zebra", "New York", "hot dog", "Äpfel"]
    labels = ["new_york", "hot-dog", "A\u0308pfel", "zebra", "hot dog"]
    found = classes(labels, names, str(tmp_path) if folders else "shards.tar")
    assert found == ["New York", "hot dog", "Äpfel", "Zebra", "hot dog"]


def test_one_misspelt_folder_does_not_pair_the_others_in_order(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the label 'hotdogs', which is not among the 3 classes of classes.txt; write"):
        classes(["zebra", "hotdogs", "cat"], ["zebra", "hot dog", "cat"], str(tmp_path))


def test_a_spelling_of_two_names_is_not_guessed() -> None:
    with pytest.raises(DataError, match=r"the label 'c-c', which could be any of 'C C', 'c\+c'"):
        classes(["c-c", "dog"], ["c+c", "C C", "dog"])
    assert classes(["C C", "DOG"], ["c+c", "C C", "dog"]) == ["C C", "dog"]


def test_folders_that_are_not_named_are_paired_in_order_and_it_is_said(tmp_path: Path) -> None:
    folders = ["n01443537", "n01440764", "n01484850"]
    found = numbered(folders, ["tench", "goldfish", "shark"], str(tmp_path), "classes.txt")
    assert found.label_n.tolist() == [1, 0, 2]
    assert found.note
    assert found.note.endswith("paired in alphabetical order ('n01440764' is 'tench', 'n01484850' is 'shark')")
    with pytest.raises(DataError, match=r"3 class folders, none of them named in classes.txt, which names 2"):
        classes(folders, ["tench", "goldfish"], str(tmp_path))
    with pytest.raises(DataError, match=r"'n01440764', which is not among the 3 classes"):
        classes(folders, ["tench", "goldfish", "shark"])  # of shards there is no order to go by


def test_names_of_signs_alone_stay_what_they_are() -> None:
    assert classes(["+", "-"], ["-", "+"]) == ["+", "-"]
    assert numbered(["-"], ["-", "+"], "x.tar", "c.txt").note is None


WORDS = st.lists(st.text("abZ", min_size=1, max_size=3), min_size=1, max_size=3)


@given(st.lists(WORDS, min_size=1, max_size=6, unique_by=lambda words: "".join(words).lower()), st.data())
def test_a_label_has_the_name_that_it_spells(names: list[list[str]], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from(range(len(names))), min_size=1, max_size=8))
    sign, change = data.draw(st.sampled_from(" _-.")), data.draw(st.sampled_from([str, str.lower, str.swapcase]))
    labels = [change(sign.join(names[i])) for i in chosen]
    assert classes(labels, [" ".join(words) for words in names]) == [" ".join(names[i]) for i in chosen]
