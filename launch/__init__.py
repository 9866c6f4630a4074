"""The user interface: the command line, recipes, and starting runs."""

import time

from .threads import limit_spinning

STARTED = time.monotonic()
"""when this process imported treering; the run logs how long the other imports took"""

limit_spinning()  # here, because every process we start imports this before torch
