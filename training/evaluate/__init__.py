"""Evaluation: scores of a model, identical at any number of ranks, and comparison of models.

`embed.py` runs the model over a data set once (`embedding_cache.py` caches the result). `retrieval.py`, `zero_shot.py`,
`probes.py`, `geometry.py` and `captioning.py` are plain functions of embeddings and texts. `protocols.py` computes the
scores of one suite (`config.py`, `prompts.py`) from them, and `suites.py` runs all suites of a recipe. The result is an
`Evaluation` (`outcome.py`). `reliability.py` has intervals and tests; `comparing.py` compares several models.
"""
