"""Treering pretrains image-text models that grow while they train.

The repository root is this package. Imports run one way: launch -> training -> models, data.
"""

__version__ = "0.1.0"
