"""`python -m treering.launch` runs the command `treering` where its script is not on the PATH."""

from .cli import main

main()
