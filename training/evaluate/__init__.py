"""Evaluation: how good a model is, the same at any number of ranks.

`embed.py` runs the model over a data set once; `retrieval.py` and `zero_shot.py` are plain functions of the embeddings;
`suites.py` puts them together into scores, chance levels and examples.
"""
