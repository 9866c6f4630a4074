"""Trains from Python and uses the model: `python docs/examples/train_from_python.py [KEY=VALUE ...]`.

`treering.train` is the command `treering train`: the same recipes, overrides and run folders, and a second call with
the same folder continues where the newest commit of the run is. Takes about a minute on two CPU cores.
"""

from __future__ import annotations

import sys

import treering

SHORTER = ["data.batch=64", "stages=[{samples: 3200}]", "schedule.warmup=640", "eval.every=null"]


def main(overrides: list[str]) -> None:
    """Train a recipe from Python; `overrides` are recipe values such as `seed=1`."""
    folder = treering.train("emoji", [*SHORTER, *overrides], out="runs/from_python")
    model = treering.load(str(folder), device="cpu")  # the weights of the run's newest commit

    names = ["a red heart", "a cat face", "the flag of Japan"]
    texts_ke = model.encode_text(names, normalize=True)
    similarity_kk = texts_ke @ texts_ke.T
    for name, row in zip(names, similarity_kk.tolist(), strict=True):
        print(f"{name:<20}", *(f"{value:6.3f}" for value in row))
    print(f"report: {folder / 'report.html'}")


if __name__ == "__main__":
    main(sys.argv[1:])
