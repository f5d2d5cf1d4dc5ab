"""The Walsh-Hadamard transform: sums and differences of vectors."""

import operator

from tvm.script.ir_builder import tirx as T

from kernels_tvm.cpu.emit import for_each_row, lanes, opaque
from kernels_tvm.cpu.targets import Target
from kernels_tvm.descriptions import LANES, HadamardDescription
from kernels_tvm.emit import Arguments, kernel
from kernels_tvm.hadamard import conference_matrix

VECTORS = 4  # combined at once: they fit into the registers of every target


def hadamard_kernel(target: Target, threads: int, hadamard: HadamardDescription):
    """From x [rows, size] -> y like x, not scaled: each number is a sum of a row's, some negated.

    A first pass over a row combines numbers within a vector and neighbouring vectors, further ones combine
    vectors that are farther apart, and a last one combines the parts of a row, as many as the order says.
    """
    size, order, power = hadamard.size, hadamard.order, hadamard.power
    width = min(LANES, power)
    vectors = power // width  # of a part

    def at(column):
        return lanes(column, width) if width > 1 else column

    def held(value):
        return opaque(value, "float32", width)

    def body(arguments: Arguments):
        x = arguments("x", ("rows", size), "float32")
        y = arguments("y", ("rows", size), "float32")

        def combine(row, step: int, count: int):
            """Combine ``count`` vectors, ``step`` apart, and first of all those within each."""
            with T.serial(0, order * vectors // (count * step)) as block, T.serial(0, step) as offset:
                columns = [T.bind((block * (count * step) + offset + i * step) * width) for i in range(count)]
                if step == 1:
                    values = [_within(held(x[row, at(column)]), width) for column in columns]
                else:
                    values = [held(y[row, at(column)]) for column in columns]
                distance = 1
                while distance < count:
                    values = [
                        held(
                            values[i ^ distance] - values[i]
                            if i & distance
                            else values[i] + values[i ^ distance]
                        )
                        for i in range(count)
                    ]
                    distance *= 2
                for column, value in zip(columns, values, strict=True):
                    T.buffer_store(y, value, [row, at(column)])

        def combine_parts(row):
            """Multiply by the matrix [[C + I, C - I], [C - I, -C - I]], see `conference_matrix`."""
            half = order // 2
            with T.serial(0, vectors) as vector:
                columns = [T.bind(part * power + vector * width) for part in range(order)]
                values = [held(y[row, at(column)]) for column in columns]
                pairs = list(zip(values[:half], values[half:], strict=True))
                sums, differences = (
                    [held(to(*pair)) for pair in pairs] for to in (operator.add, operator.sub)
                )
                for i, codes in enumerate(conference_matrix(order)):
                    upper = _signed_sum([(1, differences[i]), *zip(codes, sums, strict=True)])
                    lower = _signed_sum([(-1, sums[i]), *zip(codes, differences, strict=True)])
                    T.buffer_store(y, upper, [row, at(columns[i])])
                    T.buffer_store(y, lower, [row, at(columns[half + i])])

        def transform(row):
            step = 1
            while step == 1 or step < vectors:
                count = min(VECTORS, vectors // step)
                combine(row, step, count)
                step *= VECTORS
            if order > 1:
                combine_parts(row)

        for_each_row(target, arguments.symbols["rows"], 4 * size, threads, transform)

    return kernel(body)


def _within(value, width: int):
    """The transform of the lanes of a vector."""
    distance = 1
    while distance < width:
        other = T.Shuffle([value], [lane ^ distance for lane in range(width)])
        added, subtracted = T.bind(other + value), T.bind(other - value)
        chosen = [lane + width * bool(lane & distance) for lane in range(width)]
        value = opaque(T.Shuffle([added, subtracted], chosen), "float32", width)
        distance *= 2
    return value


def _signed_sum(terms: list):
    """The sum of vectors by their codes 0, 1 and -1, of which one at least is 1."""
    (_, total), *others = sorted(terms, key=lambda term: -term[0])
    for code, vector in others:
        if code:
            total = total + vector if code > 0 else total - vector
    return T.bind(total)
