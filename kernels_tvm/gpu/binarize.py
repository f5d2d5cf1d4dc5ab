"""Binarization on GPUs: codes of the values above their mean or above 0, as numbers or as bits."""

from tvm.script.ir_builder import tirx as T

from kernels_tvm.descriptions import BinarizeDescription
from kernels_tvm.emit import Arguments, kernel, when
from kernels_tvm.gpu.emit import WORD_LANES, barrier, fill, launch, registers, shared
from kernels_tvm.gpu.targets import GpuTarget

THREADS = 256
PARTS = 16  # blocks that share an image
OCTET = 8  # channels that a thread codes at once: bits of a byte


def scratch(binarize: BinarizeDescription, batch, rows) -> list[tuple[str, tuple, str]]:
    """Name, shape and dtype of the arrays that pass from launch to launch."""
    return [("sums", (batch, PARTS), "float32")] if binarize.sample_threshold else []


def binarize_kernel(target: GpuTarget, binarize: BinarizeDescription):
    """From x [batch, rows, channels] -> codes of the same shape, or bits [batch, rows, words].

    A thread writes eight bits as a byte, so threads need no bits of each other.
    """
    words = -(-binarize.channels // 32)

    def body(arguments: Arguments):
        x = arguments("x", ("batch", "rows", binarize.channels), "float32")
        sums = [arguments(*argument) for argument in scratch(binarize, "batch", "rows")]
        if binarize.packed:
            y = arguments("y", ("batch", "rows", words), "uint32")
        else:
            y = arguments("y", ("batch", "rows", binarize.channels), "float32")
        batch, rows = arguments.symbols["batch"], arguments.symbols["rows"]
        with when(T.And(batch > 0, rows > 0)):
            if sums:
                _launch_sums(x, sums[0], batch, rows * binarize.channels)
            _launch_codes(binarize, x, sums, y, batch, rows)

    return kernel(body)


def _for_each(size, part, thread, body):
    """Emit ``body(number)`` for numbers below ``size``, shared among the threads of an image's blocks."""
    with T.serial(0, T.ceildiv(size, PARTS * THREADS)) as turn:
        number = T.bind((turn * PARTS + part) * THREADS + thread)
        with when(number < size):
            body(number)


def _launch_sums(x, sums, batch, size):
    """Write the sum of each part of each image."""
    width = WORD_LANES if x.shape[2].value % WORD_LANES == 0 else 1
    x = T.decl_buffer((batch, size), "float32", data=x.data)
    with launch(THREADS, batch * PARTS) as (block, _, thread):
        image, part = T.bind(block // PARTS), T.bind(block % PARTS)
        totals = registers(width)
        fill(totals, T.float32(0), width)
        lanes = T.ramp(0, 1, width) if width > 1 else 0

        def add(number):
            T.buffer_store(totals, totals[lanes] + x[image, number * width + lanes], [lanes])

        _for_each(T.truncdiv(size, width), part, thread, add)
        shares = shared((THREADS,))
        total = totals[0]
        for i in range(1, width):
            total = total + totals[i]
        T.buffer_store(shares, total, [thread])
        barrier()
        half = THREADS // 2
        while half:
            with when(thread < half):
                T.buffer_store(shares, shares[thread] + shares[thread + half], [thread])
            barrier()
            half //= 2
        with when(thread == 0):
            T.buffer_store(sums, shares[0], [image, part])


def _launch_codes(binarize, x, sums, y, batch, rows):
    channels = binarize.channels
    octets = y.shape[2].value * 4 if binarize.packed else -(-channels // OCTET)
    width = WORD_LANES if channels % WORD_LANES == 0 else 1
    lanes = T.ramp(0, 1, width) if width > 1 else 0
    if binarize.packed:
        y = T.decl_buffer((batch, rows, octets), "uint8", data=y.data)
    with launch(THREADS, batch * PARTS) as (block, _, thread):
        image, part = T.bind(block // PARTS), T.bind(block % PARTS)
        limit = registers(1)
        fill(limit, T.float32(0), 1)
        if sums:
            for i in range(PARTS):
                T.buffer_store(limit, limit[0] + sums[0][image, i], [0])
            T.buffer_store(limit, limit[0] / T.Cast("float32", rows * channels), [0])

        def code(number):
            row, octet = T.bind(number // octets), T.bind(number % octets)
            values, bits = registers(width), registers(1, "int32")
            fill(bits, T.int32(0), 1)
            for start in range(0, OCTET, width):
                channel = T.bind(octet * OCTET + start)
                with when(channel < channels):
                    T.buffer_store(values, x[image, row, channel + lanes], [lanes])
                    for i in range(width):
                        above = values[i] > limit[0]
                        if binarize.packed:
                            bit = T.Select(above, T.int32(1 << (start + i)), T.int32(0))
                            T.buffer_store(bits, T.bitwise_or(bits[0], bit), [0])
                        else:
                            level = T.Select(above, T.float32(binarize.high), T.float32(binarize.low))
                            T.buffer_store(values, level, [i])
                    if not binarize.packed:
                        T.buffer_store(y, values[lanes], [image, row, channel + lanes])
            if binarize.packed:
                T.buffer_store(y, T.Cast("uint8", bits[0]), [image, row, octet])

        _for_each(rows * octets, part, thread, code)
