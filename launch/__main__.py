"""`python -m treering.launch` is the command `treering`, wherever scripts are not on the path."""

from .cli import main

main()
