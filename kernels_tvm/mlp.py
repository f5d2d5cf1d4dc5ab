"""The MLP of a block: x + fc2(gelu(depthwise(fc1(norm(x))))), in one pass over the tokens.

Each thread walks down a band of the grid, a strip of rows at a time: the strip's hidden activations stay in
its cache, two rows of them for the next strip's convolution. Only at the border between two bands are rows
expanded twice.
"""

from tvm.script.ir_builder import tirx as T

from kernels_tvm.depthwise_conv import convolve_tokens
from kernels_tvm.descriptions import LANES, Mlp
from kernels_tvm.emit import Arguments, constant, gelu, kernel, lanes, scratch, store_lanes
from kernels_tvm.linear import Layer, prepare_layers
from kernels_tvm.normalization import layer_norm_row
from kernels_tvm.targets import Target


def mlp_kernel(target: Target, threads: int, mlp: Mlp):
    """From x [images, tokens, channels], the parameters -> y [images, tokens, channels]."""
    channels, hidden = mlp.fc1.inputs, mlp.fc1.outputs
    height, width = mlp.grid or (mlp.tokens, 1)
    margin = 1 if mlp.grid else 0  # rows and columns of neighbours
    band = -(-height // threads)
    padded_width = width + 2 * margin
    strip = _strip(target, mlp, band)
    group = _group(target, width) if mlp.grid else 1

    def body(arguments: Arguments):
        x = arguments("x", ("images", mlp.tokens, channels), "float32")
        buffers = {name: arguments(name, shape, dtype) for name, shape, dtype in mlp.arguments()}
        y = arguments("y", ("images", mlp.tokens, channels), "float32")

        fc1, fc2 = (Layer(target, getattr(mlp, name), part(buffers, f"{name}_")) for name in ("fc1", "fc2"))
        prepare_layers([fc1, fc2], threads)
        with T.parallel(0, arguments.symbols["images"] * threads) as task:
            image, top = T.bind(T.floordiv(task, threads)), T.bind(T.floormod(task, threads) * band)
            bottom = T.bind(T.min(top + band, height))
            between = scratch((strip + 2 * margin) * padded_width * hidden)
            for column in (0, padded_width - 1) if margin else ():
                _clear_column(between, column, strip + 2 * margin, padded_width, hidden)

            with T.serial(0, T.ceildiv(T.max(bottom - top, 0), strip)) as number:
                # Row `local` of the strip is row `above + local` of the grid.
                above = T.bind(top + number * strip - margin)
                kept = T.bind(T.Select(number > 0, 2 * margin, 0))
                _move_rows(between, strip, kept, padded_width * hidden)
                start = T.bind(T.max(kept, 0 - above))
                stop = T.bind(T.min(strip + 2 * margin, T.min(height, bottom + margin) - above))
                # Rows above and below the grid.
                _clear_rows(between, kept, start, padded_width * hidden)
                _clear_rows(between, stop, strip + 2 * margin, padded_width * hidden)

                def load_normalized(row, buffer, offset):
                    token = T.bind((above + start) * width + row)
                    layer_norm_row(
                        lambda column: x[image, token, lanes(column)],
                        channels,
                        buffers["norm_scale"],
                        buffers["norm_bias"],
                        mlp.epsilon,
                        lambda column, value: T.buffer_store(buffer, value, [lanes(offset + column)]),
                    )

                def store_hidden(row, column, value, lanes_):
                    value = T.max(value, constant(0)) if mlp.relu else value
                    place = (start + T.floordiv(row, width)) * padded_width + T.floormod(row, width) + margin
                    T.buffer_store(between, value, [lanes(place * hidden + column)])

                fc1.tile(
                    (strip + 2 * margin) * width,
                    T.bind(T.max(stop - start, 0) * width),
                    load_normalized,
                    store_hidden,
                )

                def load_activated(row, buffer, offset):
                    place = T.bind(T.floordiv(row, width) * padded_width + T.floormod(row, width))
                    if not mlp.grid:
                        with T.serial(0, hidden // LANES) as vector:
                            value = between[lanes(place * hidden + vector * LANES)]
                            T.buffer_store(buffer, gelu(value), [lanes(offset + vector * LANES)])
                        return
                    convolve_tokens(
                        between,
                        place,
                        group,
                        padded_width,
                        hidden,
                        buffers["conv_kernel"],
                        buffers["conv_bias"],
                        lambda member, column, value: T.buffer_store(
                            buffer, gelu(value), [lanes(offset + member * hidden + column)]
                        ),
                    )

                def store(row, column, value, lanes_):
                    token = T.bind((above + margin) * width + row)
                    value = value + x[image, token, lanes(column)]
                    store_lanes(y, value, [image, token], column, lanes_)

                fc2.tile(
                    strip * width,
                    T.bind(T.min(strip, bottom - above - margin) * width),
                    load_activated,
                    store,
                    group,
                )

    return kernel(body)


def _strip(target: Target, mlp: Mlp, band: int) -> int:
    """Rows of the grid that a thread works on at once: what the cache holds, in equal parts of a band."""
    width = mlp.grid[1] + 2 if mlp.grid else 1
    fits = max(1, target.strip_bytes // (4 * width * mlp.fc1.outputs) - (2 if mlp.grid else 0))
    return -(-band // -(-band // fits))


def _group(target: Target, width: int) -> int:
    """Neighbouring tokens that are convolved together and share their loads: a divisor of the width."""
    return max(size for size in range(1, target.convolved_tokens + 1) if width % size == 0)


def _clear_column(buffer, column, rows, width, channels):
    with T.serial(0, rows) as row, T.serial(0, channels // LANES) as vector:
        T.buffer_store(buffer, constant(0), [lanes((row * width + column) * channels + vector * LANES)])


def _clear_rows(buffer, start, stop, row_size):
    with T.serial(0, T.max(stop - start, 0) * (row_size // LANES)) as vector:
        T.buffer_store(buffer, constant(0), [lanes(start * row_size + vector * LANES)])


def _move_rows(buffer, start, count, row_size):
    """Rows from ``start`` on to the front."""
    with T.serial(0, count * (row_size // LANES)) as vector:
        at = vector * LANES
        T.buffer_store(buffer, buffer[lanes(start * row_size + at)], [lanes(at)])


def part(buffers: dict, prefix: str) -> dict:
    """The buffers whose names start with ``prefix``, without it."""
    return {name.removeprefix(prefix): buffer for name, buffer in buffers.items() if name.startswith(prefix)}
