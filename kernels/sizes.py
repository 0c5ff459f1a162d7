"""Sizes of tiles and grids. Triton's own functions of these names take 8 us a call from Python."""

from __future__ import annotations


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the least power of two that is not below n, for n > 0."""
    return 1 << (n - 1).bit_length()
