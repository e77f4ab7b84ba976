"""`python -m monkeyjump`."""

from monkeyjump.cli import main

main()
