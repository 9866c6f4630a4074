"""The user interface: the command line, recipes, and starting runs."""

import time

from .runtimes import limit_spinning, use_expandable_segments

STARTED = time.monotonic()
"""when this process imported treering; the run logs how long the other imports took"""

# Here, because every process we start imports this before torch.
limit_spinning()
use_expandable_segments()
