"""The packed forms of weights: what the bytes of their arrays mean.

A dense weight [inputs, outputs], padded with zeros to a multiple of 16 outputs, is cut into blocks of 16
outputs, [outputs / 16, inputs, 16]. The numbers that a kernel reads for a few outputs lie together in a
block. In rows they would lie apart, and a cache keeps few lines whose distance is a large power of two.

A power-of-two weight is 0 or +-2^(code - 1 + exponent), with one ``exponent`` for each output channel and a
code from 1 to 15 (5 bits a weight with its sign) or to 7 (4 bits a weight: then 2^(code - 1) is at most 64
and an int8 number). Weights [inputs, outputs] are padded with zeros to multiples of 4 and 16 and cut into
tiles of 4 inputs x 16 outputs, [outputs / 16, inputs / 4, tile bytes]. Numbered 4 * output + input, the 64
weights of a tile are in

- 32 bytes of codes: number i in the low half of byte i, number 32 + i in its high half. With 4 bits the
  highest bit of a half is the sign;
- with 5 bits, 8 more bytes of signs: number i in bit i % 8 of byte i / 8.

Whole numbers from -127 to 127 take 8 bits: tiles are cut and numbered the same way, with number i in byte i,
int8. They are sums and differences of two powers of two, +-2^a +- 2^b with exponents from 0 to 6, times
2^exponent of the output; or dense weights in int8, times a float32 scale of the output.

The functions take and return arrays of NumPy, or of what else is given as ``xp``, such as ``jax.numpy``.
"""

from types import ModuleType
from typing import Any

import numpy as np

TILE_INPUTS, TILE_OUTPUTS = 4, 16
TILE_BYTES = {4: 32, 5: 40, 8: 64}
LARGEST_CODE = {4: 7, 5: 15}
SIGNS_OFFSET = 32


def blocked_shape(inputs: int, outputs: int) -> tuple[int, int, int]:
    """The shape of a dense weight's blocks."""
    return -(-outputs // TILE_OUTPUTS), inputs, TILE_OUTPUTS


def packed_shape(inputs: int, outputs: int, bits: int) -> tuple[int, int, int]:
    """The shape of the bytes of a weight in tiles."""
    return -(-outputs // TILE_OUTPUTS), -(-inputs // TILE_INPUTS), TILE_BYTES[bits]


def bits_of(tiles: Any) -> int:
    """Bits of a weight, 4, 5 or 8, in tiles [outputs / 16, inputs / 4, tile bytes]."""
    return next(bits for bits, size in TILE_BYTES.items() if size == tiles.shape[-1])


def write_blocks(weight: Any, xp: ModuleType = np) -> Any:
    """A dense weight [inputs, outputs], cut into blocks."""
    blocks, inputs, size = blocked_shape(*weight.shape)
    padded = xp.pad(weight, ((0, 0), (0, blocks * size - weight.shape[1])))
    return padded.reshape(inputs, blocks, size).transpose(1, 0, 2)


def read_blocks(blocks: Any, outputs: int) -> Any:
    """The dense weight that `write_blocks` cut."""
    return blocks.transpose(1, 0, 2).reshape(blocks.shape[1], -1)[:, :outputs]


def write_tiles(codes: Any, negative: Any, bits: int, xp: ModuleType = np) -> Any:
    """A power-of-two weight's tiles, uint8, from its codes and signs, both uint8 [inputs, outputs]."""
    inputs, outputs = codes.shape
    shape = packed_shape(inputs, outputs, bits)
    codes, negative = (_to_tiles(part, shape, xp) for part in (codes, negative))
    if bits == 4:
        codes = codes | (negative << 3)
    halves = codes[..., :SIGNS_OFFSET] | (codes[..., SIGNS_OFFSET:] << 4)
    if bits == 4:
        return halves
    return xp.concatenate([halves, xp.packbits(negative, axis=-1, bitorder="little")], axis=-1)


def read_tiles(tiles: Any, inputs: int, outputs: int, xp: ModuleType = np) -> tuple[Any, Any]:
    """The codes and signs that `write_tiles` laid out, each uint8 [inputs, outputs]."""
    halves = tiles[..., :SIGNS_OFFSET]
    numbers, sign_bit = xp.concatenate([halves & 15, halves >> 4], axis=-1), 3
    if bits_of(tiles) == 5:
        sign_bit = 4
        numbers |= xp.unpackbits(tiles[..., SIGNS_OFFSET:], axis=-1, bitorder="little") << sign_bit
    numbers = _from_tiles(numbers)[:inputs, :outputs]
    return numbers & (2**sign_bit - 1), numbers >> sign_bit


def write_numbers(numbers: Any, xp: ModuleType = np) -> Any:
    """The tiles, int8, of whole numbers, int8 [inputs, outputs]."""
    inputs, outputs = numbers.shape
    return _to_tiles(numbers, packed_shape(inputs, outputs, 8), xp)


def read_numbers(tiles: Any, inputs: int, outputs: int) -> Any:
    """The whole numbers that `write_numbers` laid out, int8 [inputs, outputs]."""
    return _from_tiles(tiles)[:inputs, :outputs]


def _to_tiles(part, shape, xp):
    """[inputs, outputs] -> [output tiles, input tiles, 64], zero-padded."""
    rows, columns = shape[1] * TILE_INPUTS, shape[0] * TILE_OUTPUTS
    part = xp.pad(part, ((0, rows - part.shape[0]), (0, columns - part.shape[1])))
    part = part.reshape(shape[1], TILE_INPUTS, shape[0], TILE_OUTPUTS).transpose(2, 0, 3, 1)
    return part.reshape(*shape[:2], TILE_INPUTS * TILE_OUTPUTS)


def _from_tiles(part):
    columns, rows = part.shape[:2]
    part = part.reshape(columns, rows, TILE_OUTPUTS, TILE_INPUTS).transpose(1, 3, 0, 2)
    return part.reshape(rows * TILE_INPUTS, columns * TILE_OUTPUTS)
