"""Other libraries' weights, in and out: `interop.load(FILE)`, see README.md."""

from .importing import load

__all__ = ["load"]
