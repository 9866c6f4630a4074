"""Data sets by name, as in samples://emoji: the built-in ones, and the lookup of those from other packages."""

from __future__ import annotations

from .registry import SampleSet as SampleSet
