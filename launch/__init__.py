"""What a person touches: the command line, recipes, and the starting of runs."""

import time

BEGUN = time.monotonic()
"""when this process came here: a run's records tell how long the imports took"""
