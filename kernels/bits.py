"""Words of 64 bits: counting and finding bits, and masks packed into them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsi_engine.kernels._compile import compiled

ONE = np.uint64(1)
LAST = np.uint64(63)
_TWO, _FOUR, _TOP_BYTE = np.uint64(2), np.uint64(4), np.uint64(56)
_PAIRS, _NIBBLES = np.uint64(0x5555555555555555), np.uint64(0x3333333333333333)
_BYTES, _BYTE_SUM = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(0x0101010101010101)


@compiled
def count_bits(word: np.uint64) -> np.uint64:
    """Number of bits set. The compiler knows these steps and makes one instruction of them.

    Source: H. Warren, "Hacker's Delight", 2nd ed. 2012, section 5-1.
    """
    word = word - ((word >> ONE) & _PAIRS)
    word = (word & _NIBBLES) + ((word >> _TWO) & _NIBBLES)
    word = (word + (word >> _FOUR)) & _BYTES
    return (word * _BYTE_SUM) >> _TOP_BYTE


@compiled
def lowest_bit(word: np.uint64) -> np.uint64:
    """Number of the lowest bit set: how many zeros are below it; 64 for zero."""
    return count_bits(~word & (word - ONE))


def pack_rows(mask: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """(H, W) pixels as (H, ⌈W / 64⌉) words, the first pixel in the lowest bit, zero behind the last pixel."""
    packed = np.packbits(mask, axis=1, bitorder="little")
    words = np.zeros((mask.shape[0], -(-mask.shape[1] // 64)), "<u8")
    words.view(np.uint8)[:, : packed.shape[1]] = packed
    return words.astype(np.uint64, copy=False)
