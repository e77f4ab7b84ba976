"""`python -m monkeyjump`."""

from .cli import main

main()
