"""The Walsh-Hadamard transform on GPUs: sums and differences of numbers in shared memory."""

from tvm.script.ir_builder import tirx as T

from kernels_tvm.descriptions import HadamardDescription
from kernels_tvm.emit import Arguments, kernel, when
from kernels_tvm.gpu.emit import barrier, launch, registers, shared
from kernels_tvm.gpu.targets import GpuTarget
from kernels_tvm.gpu.tiles import ThreadBlock
from kernels_tvm.hadamard import conference_matrix

THREADS = 256
NUMBERS = 2048  # of a block, at least one row


def hadamard_kernel(target: GpuTarget, hadamard: HadamardDescription):
    """From x [rows, size] -> y like x, not scaled: each number is a sum of a row's, some negated."""
    size, order, power = hadamard.size, hadamard.order, hadamard.power
    rows_at_once = max(1, NUMBERS // size)
    count = rows_at_once * size

    def body(arguments: Arguments):
        x = arguments("x", ("rows", size), "float32")
        y = arguments("y", ("rows", size), "float32")
        rows = arguments.symbols["rows"]
        with when(rows > 0), launch(THREADS, T.ceildiv(rows, rows_at_once)) as (x_block, _, thread):
            block = ThreadBlock(THREADS, thread, T.bind(x_block * rows_at_once), 0)
            held = shared((count,))

            def load(number):
                row = T.bind(block.first_row + number // size)
                value = registers(1)
                T.buffer_store(value, T.float32(0), [0])
                with when(row < rows):
                    T.buffer_store(value, x[row, number % size], [0])
                T.buffer_store(held, value[0], [number])

            def store(number):
                row = T.bind(block.first_row + number // size)
                with when(row < rows):
                    T.buffer_store(y, held[number], [row, number % size])

            def combine(distance):
                def pair(number):
                    at = T.bind(number // distance * (2 * distance) + number % distance)
                    pair = registers(2)
                    for i in range(2):
                        T.buffer_store(pair, held[at + i * distance], [i])
                    T.buffer_store(held, pair[0] + pair[1], [at])
                    T.buffer_store(held, pair[0] - pair[1], [at + distance])

                return pair

            block.each(count, load)
            barrier()
            distance = 1
            while distance < power:
                block.each(count // 2, combine(distance))
                barrier()
                distance *= 2
            if order > 1:
                block.each(count // order, lambda number: _combine_parts(held, order, power, number))
                barrier()
            block.each(count, store)

    return kernel(body)


def _combine_parts(held, order: int, power: int, number):
    """Multiply a column of a row's parts by the matrix of the order, see `conference_matrix`."""
    half = order // 2
    first = T.bind(number // power * (order * power) + number % power)
    sums, differences = registers(half), registers(half)
    for i in range(half):
        upper, lower = (held[first + part * power] for part in (i, half + i))
        T.buffer_store(sums, upper + lower, [i])
        T.buffer_store(differences, upper - lower, [i])
    totals = registers(2)
    for i, codes in enumerate(conference_matrix(order)):
        T.buffer_store(totals, differences[i], [0])
        T.buffer_store(totals, T.float32(0) - sums[i], [1])
        for j, code in enumerate(codes):
            for place, values in enumerate((sums, differences)):
                if code:
                    total = totals[place] + values[j] if code > 0 else totals[place] - values[j]
                    T.buffer_store(totals, total, [place])
        for place in range(2):
            T.buffer_store(held, totals[place], [first + (place * half + i) * power])
