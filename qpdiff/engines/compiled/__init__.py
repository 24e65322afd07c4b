"""The compiled engine: the method in C++, for NumPy arrays. Importing it is an ImportError where it was not built."""

from .engine import LEVEL, refusal, solve

__all__ = ["LEVEL", "refusal", "solve"]
