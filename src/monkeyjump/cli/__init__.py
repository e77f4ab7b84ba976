"""The `monkeyjump` command."""

from monkeyjump.cli.app import main

__all__ = ["main"]
