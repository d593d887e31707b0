"""Codes of 1 to 8 bits in 32-bit words, densely: a stream of bits, lowest first, as GPTQ, AWQ and compressed-tensors
have them. 32 codes of 3 bits fill three words, and two of the codes lie across a border.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Int32, UInt8

from qjax.errors import FormatError


def words_for(count: int, bits: int) -> int:
    """How many words `count` codes fill, the last with zeros after them."""
    return -(-count * bits // 32)


def pack_words(codes: UInt8[np.ndarray, "*lead n"], bits: int) -> Int32[np.ndarray, "*lead words"]:
    """Words of codes below 2**bits, along the last axis."""
    *lead, n = codes.shape
    words = words_for(n, bits)
    # Eight codes fill `bits` bytes; zeros after the codes, up to whole words at least.
    eights = -(-words * 4 // bits)
    padded = np.zeros((*lead, eights * 8), np.uint8)
    padded[..., :n] = codes
    chunks = padded.reshape(*lead, eights, 8)
    stream = np.zeros((*lead, eights), "<u8")
    for i in range(8):
        stream |= chunks[..., i].astype("<u8") << np.uint64(bits * i)
    data = stream.view(np.uint8).reshape(*lead, eights, 8)[..., :bits].reshape(*lead, eights * bits)
    return np.ascontiguousarray(data[..., : words * 4]).view("<i4").astype(np.int32, copy=False)


def unpack_words(words: Int32[np.ndarray, "*lead words"], bits: int, count: int) -> UInt8[np.ndarray, "*lead n"]:
    """`count` codes of words along the last axis: the inverse of `pack_words`."""
    *lead, n = words.shape
    if n != words_for(count, bits):
        raise ValueError(f"expected {words_for(count, bits)} words of {count} codes of {bits} bits, got {n}")
    eights = -(-count // 8)
    data = np.zeros((*lead, max(eights * bits, n * 4)), np.uint8)
    data[..., : n * 4] = np.ascontiguousarray(words, "<i4").view(np.uint8)
    stream = np.zeros((*lead, eights, 8), np.uint8)
    stream[..., :bits] = data[..., : eights * bits].reshape(*lead, eights, bits)
    stream = stream.view("<u8")
    codes = np.empty((*lead, eights, 8), np.uint8)
    for i in range(8):
        codes[..., i] = (stream[..., 0] >> np.uint64(bits * i)).astype(np.uint8)
    codes &= np.uint8((1 << bits) - 1)
    return codes.reshape(*lead, eights * 8)[..., :count]


def checked(tensors: Mapping[str, np.ndarray], suffix: str, kinds: tuple[str, ...], ndim: int) -> np.ndarray:
    """A module's tensor with its dtype and number of axes as they have to be.

    Raises:
      FormatError: it is missing, or is something else; the message begins with its suffix.
    """
    tensor = tensors.get(suffix)
    if tensor is None:
        raise FormatError(f"{suffix} is missing; there are {', '.join(sorted(tensors))}")
    if tensor.dtype.name not in kinds or tensor.ndim != ndim:
        expected = f"{' or '.join(kinds)} with {ndim} axes"
        raise FormatError(f"{suffix} is {tensor.dtype.name} {list(tensor.shape)}, expected {expected}")
    return tensor
