"""Depthwise convolutions on GPUs, zero-padded: over a grid of tokens, or over the tokens as one row."""

from tvm.script.ir_builder import tirx as T

from kernels_tvm.descriptions import DepthwiseConvDescription
from kernels_tvm.emit import Arguments, kernel, when
from kernels_tvm.gpu.emit import WORD_LANES, all_of, barrier, fill, launch, registers, shared
from kernels_tvm.gpu.instructions import gelu
from kernels_tvm.gpu.targets import GpuTarget
from kernels_tvm.gpu.tiles import ThreadBlock

THREADS = 256
PLACES = 64  # tokens that a block computes
CHANNELS = 32  # of a block, at most; a large convolution leaves room for fewer


def depthwise_conv_kernel(target: GpuTarget, conv: DepthwiseConvDescription):
    """From x [images, height, width, channels], kernel [taps, channels] -> y like x.

    With ``conv.gelu`` a bias [channels] comes after the kernel.
    """
    tall, wide = (1, PLACES) if conv.height == 1 else (8, PLACES // 8)
    rows, columns = conv.kernel
    margin_tall, margin_wide = tall + rows - 1, wide + columns - 1  # of the tokens that a block reads
    words = margin_tall * margin_wide + rows * columns
    count = CHANNELS
    while count > WORD_LANES and 4 * count * words > target.shared_memory:
        count //= 2
    width = WORD_LANES if conv.channels % WORD_LANES == 0 else 1
    lanes = T.ramp(0, 1, width) if width > 1 else 0
    vectors = count // width
    down, across = -(-conv.height // tall), -(-conv.width // wide)

    def body(arguments: Arguments):
        shape = "images", conv.height, conv.width, conv.channels
        x = arguments("x", shape, "float32")
        weights = arguments("kernel", (rows * columns, conv.channels), "float32")
        bias = arguments("bias", (conv.channels,), "float32") if conv.gelu else None
        y = arguments("y", shape, "float32")
        images = arguments.symbols["images"]
        with (
            when(images > 0),
            launch(THREADS, images * (down * across), -(-conv.channels // count)) as (place, part, thread),
        ):
            image, tile = T.bind(place // (down * across)), T.bind(place % (down * across))
            first_row, first_column = T.bind(tile // across * tall), T.bind(tile % across * wide)
            block = ThreadBlock(THREADS, thread, first_row, first_column)
            tokens = shared((margin_tall * margin_wide, count))
            taps = shared((rows * columns, count))

            def load(number):
                index, channel = T.bind(number // vectors), T.bind(number % vectors * width)
                row = T.bind(first_row + index // margin_wide - rows // 2)
                column = T.bind(first_column + index % margin_wide - columns // 2)
                source = T.bind(part * count + channel)
                values = registers(width)
                fill(values, T.float32(0), width)
                inside = [row >= 0, row < conv.height, column >= 0, column < conv.width]
                with when(all_of(*inside, source < conv.channels)):
                    T.buffer_store(values, x[image, row, column, source + lanes], [lanes])
                T.buffer_store(tokens, values[lanes], [index, channel + lanes])

            def load_taps(number):
                tap, channel = T.bind(number // vectors), T.bind(number % vectors * width)
                source = T.bind(part * count + channel)
                with when(source < conv.channels):
                    T.buffer_store(taps, weights[tap, source + lanes], [tap, channel + lanes])

            def convolve(number):
                index, channel = T.bind(number // vectors), T.bind(number % vectors * width)
                row, column = T.bind(index // wide), T.bind(index % wide)
                total = registers(width)
                fill(total, T.float32(0), width)
                with T.serial(0, rows) as i, T.serial(0, columns) as j:
                    token = (row + i) * margin_wide + column + j
                    value = tokens[token, channel + lanes] * taps[i * columns + j, channel + lanes]
                    T.buffer_store(total, total[lanes] + value, [lanes])
                place, target_channel = (first_row + row, first_column + column), part * count + channel
                inside = [place[0] < conv.height, place[1] < conv.width, target_channel < conv.channels]
                with when(all_of(*inside)):
                    if bias is not None:
                        for lane in range(width):
                            value = total[lane] + bias[target_channel + lane]
                            T.buffer_store(total, gelu(target, value), [lane])
                    T.buffer_store(y, total[lanes], [image, *place, target_channel + lanes])

            block.each(margin_tall * margin_wide * vectors, load)
            block.each(rows * columns * vectors, load_taps)
            barrier()
            block.each(PLACES * vectors, convolve)

    return kernel(body)
