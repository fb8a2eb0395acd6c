"""The engine's version, which every store records."""

__version__ = "0.1.0"
