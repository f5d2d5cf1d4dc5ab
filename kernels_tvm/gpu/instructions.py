"""The instructions that CUDA and OpenCL do not share.

For OpenCL, `dot4` is expanded, and a tensor core's product is computed from the registers of a warp's lanes.
The PTX ISA says which number each register holds, in the sections "Matrix Fragments for mma.m8n8k16",
"... m16n8k32", "... m8n8k128" and "... m16n8k256"; they agree once a word of 32 bits is one element. So tests
on a CPU cover all of a kernel but the instruction itself.
"""

import math
from typing import Literal

from tvm.backend.cuda.op import cuda_func_call
from tvm.script.ir_builder import tirx as T

from kernels_tvm.gpu.emit import barrier, shared
from kernels_tvm.gpu.targets import GpuTarget

WARP = 32
TENSOR_CORE_OPERANDS = {"int8": "s8.s8.s32", "bits": "b1.b1.s32.xor.popc"}


def dot4(target: GpuTarget, a, b, c):
    """``c`` plus the products of the four int8 numbers in the words ``a`` and ``b``, int32."""
    if target.arch:
        return T.call_pure_extern("int32", "__dp4a", a, b, c)
    for byte in range(4):
        c = c + signed_byte(a, byte) * signed_byte(b, byte)
    return c


def signed_byte(word, byte: int):
    """One of the four int8 numbers in a word, int32."""
    return T.shift_right(T.shift_left(word, T.int32(24 - 8 * byte)), T.int32(24))


def different_bits(target: GpuTarget, a, b, c):
    """``c`` plus how many bits of the words ``a`` and ``b`` differ, int32."""
    return c + T.call_pure_extern("int32", "__popc" if target.arch else "popcount", T.bitwise_xor(a, b))


def round_to_even(target: GpuTarget, x):
    """The nearest whole number, float32; the even one of two equally near."""
    return T.call_pure_extern("float32", "rintf" if target.arch else "rint", x)


def gelu(target: GpuTarget, x):
    """Return x Phi(x), float32."""
    x = T.bind(x)
    erf = T.call_pure_extern("float32", "erff" if target.arch else "erf", x * T.float32(1 / math.sqrt(2)))
    return x * (T.float32(0.5) + T.float32(0.5) * erf)


class TensorCore:
    """A warp's product of words: ``c[row, column] += sum of a[row, word] * b[column, word]``.

    The product of two words is `dot4` if a word is four int8 numbers, and `different_bits` if it is 32 bits.
    Each lane holds ``a_registers`` words of a, ``b_registers`` of b and ``c_registers`` sums; `a_place`,
    `b_place` and `c_place` say which. A launch makes the object once, for ``threads`` threads in whole warps,
    and all of them call `multiply` together.

    Attributes:
      rows: of a product.
      columns: of a product.
      words: the words that one product sums over.
    """

    def __init__(self, target: GpuTarget, kind: Literal["int8", "bits"], threads: int):
        self.target, self.kind, self.threads = target, kind, threads
        shape = target.int8_mma if kind == "int8" else target.bit_mma
        if shape is None:
            raise ValueError(f"{target.name} has no tensor cores for {kind}")
        self.rows, self.columns, inner = shape
        self.words = inner // {"int8": 4, "bits": 32}[kind]
        self.shape = f"m{self.rows}n{self.columns}k{inner}"
        self.a_registers = self.rows * self.words // WARP
        self.b_registers = self.columns * self.words // WARP
        self.c_registers = self.rows * self.columns // WARP

    def a_place(self, lane, register):
        """Row and word of a register of a."""
        halves = self.rows // 8
        return lane // 4 + register % halves * 8, lane % 4 + register // halves * 4

    def b_place(self, lane, register):
        """Column and word of a register of b."""
        return lane // 4, lane % 4 + register * 4

    def c_place(self, lane, register):
        """Row and column of a sum."""
        return lane // 4 + register // 2 * 8, lane % 4 * 2 + register % 2

    def multiply(self, sums, a, b, tall: int, wide: int, thread) -> None:
        """Add ``tall`` x ``wide`` products to the sums, whose registers lie one product after the other."""
        if not self.target.arch:
            self._multiply_by_hand(sums, a, b, tall, wide, thread)
            return
        for i in range(tall):
            for j in range(wide):
                starts = (
                    (sums, (i * wide + j) * self.c_registers),
                    (a, i * self.a_registers),
                    (b, j * self.b_registers),
                )
                addresses = [T.address_of(registers[start]) for registers, start in starts]
                T.evaluate(cuda_func_call(f"mma_{self.kind}", *addresses, source_code=self._source()))

    def _multiply_by_hand(self, sums, a, b, tall, wide, thread):
        # All lanes of the warp read every lane's registers from here.
        a_words = shared((self.threads, tall * self.a_registers), "int32")
        b_words = shared((self.threads, wide * self.b_registers), "int32")
        with T.serial(0, tall * self.a_registers) as register:
            T.buffer_store(a_words, a[register], [thread, register])
        with T.serial(0, wide * self.b_registers) as register:
            T.buffer_store(b_words, b[register], [thread, register])
        barrier()
        product = dot4 if self.kind == "int8" else different_bits
        lane = T.bind(thread % WARP)
        warp = T.bind(thread - lane)
        with (
            T.serial(0, tall) as i,
            T.serial(0, wide) as j,
            T.serial(0, self.c_registers) as register,
            T.serial(0, self.words) as word,
        ):
            row, column = self.c_place(lane, register)
            at = T.bind((i * wide + j) * self.c_registers + register)
            # The inverses of `a_place` and `b_place` say which lane and register holds a word.
            a_register = i * self.a_registers + row // 8 + word // 4 * (self.rows // 8)
            a_word = T.bind(a_words[warp + row % 8 * 4 + word % 4, a_register])
            b_word = T.bind(b_words[warp + column * 4 + word % 4, j * self.b_registers + word // 4])
            T.buffer_store(sums, product(self.target, a_word, b_word, sums[at]), [at])
        barrier()

    def _source(self):
        counts = (self.c_registers, self.a_registers, self.b_registers)
        starts = (0, counts[0], counts[0] + counts[1])
        c, a, b = (
            "{" + ", ".join(f"%{start + i}" for i in range(count)) + "}"
            for start, count in zip(starts, counts, strict=True)
        )
        operands = TENSOR_CORE_OPERANDS[self.kind]
        written = ", ".join(f'"+r"(c[{i}])' for i in range(counts[0]))
        read = ", ".join(
            f'"r"({name}[{i}])' for name, n in zip("ab", counts[1:], strict=True) for i in range(n)
        )
        return (
            f"__device__ __forceinline__ void mma_{self.kind}(int* c, const int* a, const int* b) {{\n"
            f'  asm("mma.sync.aligned.{self.shape}.row.col.s32.{operands} {c}, {a}, {b}, {c};"\n'
            f"      : {written} : {read});\n}}\n"
        )
