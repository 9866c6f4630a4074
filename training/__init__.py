"""One run: stages, steps, objectives, the engine, commits, growth, evaluation, and what a person sees of it.

`loop.py` is the way in: it reads top to bottom like the run it makes.
"""
