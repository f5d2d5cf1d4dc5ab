"""Products of binary codes by the number of bits in which they differ."""

from tvm.script.ir_builder import tirx as T

from kernels_tvm.cpu.emit import lanes, splat, split
from kernels_tvm.cpu.targets import Target
from kernels_tvm.descriptions import LANES, HammingProductDescription
from kernels_tvm.emit import Arguments, kernel


def hamming_product_kernel(target: Target, threads: int, product: HammingProductDescription):
    """From queries [batch, rows, words], keys [batch, words, others] -> y [batch, rows, others], int32.

    A word holds 32 signs of -1 and 1 as bits. The product of two codes is their length less twice the number
    of bits in which they differ.
    """
    words = product.words

    def body(arguments: Arguments):
        queries = arguments("queries", ("batch", "rows", words), "uint32")
        keys = arguments("keys", ("batch", words, "others"), "uint32")
        y = arguments("y", ("batch", "rows", "others"), "int32")
        rows, others = arguments.symbols["rows"], arguments.symbols["others"]
        with T.parallel(0, arguments.symbols["batch"] * rows) as task:
            image, row = split(task, rows)
            with T.serial(0, T.floordiv(others, LANES)) as vector:
                start = vector * LANES
                distance = splat(T.uint32(0))
                for word in range(words):
                    differ = splat(queries[image, row, word]) ^ keys[image, word, lanes(start)]
                    distance = distance + T.popcount(differ)
                twice = T.shift_left(T.Cast(f"int32x{LANES}", distance), splat(T.int32(1)))
                T.buffer_store(y, splat(T.int32(product.length)) - twice, [image, row, lanes(start)])
            with T.serial(0, T.floormod(others, LANES)) as left:
                other = T.bind(others - 1 - left)
                distance = T.uint32(0)
                for word in range(words):
                    differ = queries[image, row, word] ^ keys[image, word, other]
                    distance = distance + T.popcount(differ)
                twice = T.shift_left(T.Cast("int32", distance), T.int32(1))
                T.buffer_store(y, T.int32(product.length) - twice, [image, row, other])

    return kernel(body)
