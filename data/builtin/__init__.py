"""Data sets by name, as in samples://emoji: those that come with the package, and how others are found."""

from __future__ import annotations

from .registry import SampleSet as SampleSet
