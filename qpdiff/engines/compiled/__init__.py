"""The compiled engine: the method in C++, for NumPy arrays. Importing it is an ImportError where it was not built."""

from .engine import INSTRUCTIONS, refusal, solve, without_factor

__all__ = ["INSTRUCTIONS", "refusal", "solve", "without_factor"]
