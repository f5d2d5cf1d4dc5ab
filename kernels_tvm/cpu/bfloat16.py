"""Vectors of bfloat16 numbers: conversion to float32, rounding, and pairs in words of 32 bits."""

from tvm.script.ir_builder import tirx as T

from kernels_tvm.cpu.emit import splat
from kernels_tvm.descriptions import LANES


def _bits(x):
    return T.reinterpret(f"uint32x{LANES}", x)


def from_bfloat16(bits):
    """A vector of bfloat16 numbers, given as their bits in uint16, as float32."""
    wide = T.shift_left(T.Cast(f"uint32x{LANES}", bits), splat(T.uint32(16)))
    return T.reinterpret(f"float32x{LANES}", wide)


def _upper_half(bits):
    return T.bitwise_and(bits, splat(T.uint32(0xFFFF0000)))


def _pair(low, high):
    """Two vectors of bits as one: each lane has the upper halves of their lanes, that of ``low`` below."""
    return T.bitwise_or(T.shift_right(low, splat(T.uint32(16))), _upper_half(high))


def _nearest(x):
    """Bits whose upper half is the bfloat16 number nearest to ``x``; the even one of two equally near."""
    bits = T.bind(_bits(x))
    odd = T.bitwise_and(T.shift_right(bits, splat(T.uint32(16))), splat(T.uint32(1)))
    return T.bind(bits + (odd + splat(T.uint32(0x7FFF))))


def rounded_to_bfloat16(x):
    """A vector of float32 numbers, each rounded to bfloat16."""
    return T.reinterpret(f"float32x{LANES}", _upper_half(_nearest(x)))


def exact_pairs(first, second):
    """Numbers that are bfloat16 already, two in a lane of uint32 with the ``first`` in the low half."""
    return (_pair(_bits(first), _bits(second)),)


def rounded_pairs(first, second):
    """The nearest bfloat16 numbers, two in a lane of uint32 with the ``first`` in the low half."""
    return (_pair(_nearest(first), _nearest(second)),)


def bfloat16_pairs(first, second):
    """Each value as the sum of two bfloat16 numbers: a vector for each of them, with pairs in its lanes.

    The ``first`` value is in the low half of a lane of uint32.
    """

    def shifted_up(x):
        """`_nearest` in one addition. Either of two equally near numbers will do: the rest corrects it."""
        return T.bind(_bits(x) + splat(T.uint32(0x8000)))

    def rest(x, bits):
        return T.bind(x - T.reinterpret(f"float32x{LANES}", _upper_half(bits)))

    bits = shifted_up(first), shifted_up(second)
    rests = (shifted_up(rest(x, b)) for x, b in zip((first, second), bits, strict=True))
    return _pair(*bits), _pair(*rests)
