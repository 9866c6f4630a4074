"""What a person touches: the command line, recipes, and the starting of runs."""

import time

from .threads import limit_spinning

BEGUN = time.monotonic()
"""when this process came here: a run's records tell how long the imports took"""

limit_spinning()  # here, since every process that we start comes through here before it imports torch
