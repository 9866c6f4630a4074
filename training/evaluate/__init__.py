"""Evaluation: how good a model is, the same at any number of ranks, and where two models differ.

`embed.py` runs the model over a data set once (`kept.py` keeps what it made); `retrieval.py`, `zero_shot.py`,
`probes.py`, `geometry.py` and `captioning.py` are plain functions of embeddings and texts; `protocols.py` makes scores
of them for a suite (`config.py`, `prompts.py`), `suites.py` runs all suites of a recipe. What was found is an
`Evaluation` (`outcome.py`); how far it can be trusted says `reliability.py`, and `comparing.py` compares several.
"""
