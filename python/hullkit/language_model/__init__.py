"""A language model in a pass: its interface, its loss, and the pieces that run in its place."""

from .bits_per_byte import bits_per_byte

__all__ = ["bits_per_byte"]
