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
"""

TILE_INPUTS, TILE_OUTPUTS = 4, 16
TILE_BYTES = {4: 32, 5: 40}
LARGEST_CODE = {4: 7, 5: 15}
SIGNS_OFFSET = 32


def blocked_shape(inputs: int, outputs: int) -> tuple[int, int, int]:
    """The shape of a dense weight's blocks."""
    return -(-outputs // TILE_OUTPUTS), inputs, TILE_OUTPUTS


def packed_shape(inputs: int, outputs: int, bits: int) -> tuple[int, int, int]:
    """The shape of a power-of-two weight's bytes."""
    return -(-outputs // TILE_OUTPUTS), -(-inputs // TILE_INPUTS), TILE_BYTES[bits]
