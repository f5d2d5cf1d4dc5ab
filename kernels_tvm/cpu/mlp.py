"""The MLP of a block: x + fc2(gelu(depthwise(fc1(norm(x))))).

With many tokens, one pass over them computes everything. Each thread walks down the grid, a strip of rows at
a time. A strip's hidden activations stay in the thread's cache, and two rows of them serve the next strip's
convolution. Rows at the border of two threads' strips are expanded twice.

If channels outnumber tokens (see `few_rows`) and a thread's share of these is small, each thread would decode
all weights for little. Then the outputs of both layers are cut among the threads, and every thread loads all
rows. Both ways were timed for 49 to 197 tokens, on two threads of a Xeon with AMX and on its lesser targets.
"""

from tvm.script.ir_builder import tirx as T

from kernels_tvm.cpu.depthwise_conv import convolve_tokens
from kernels_tvm.cpu.elementary import gelu
from kernels_tvm.cpu.emit import Claims, constant, lanes, local, scratch, split, store_lanes, turns
from kernels_tvm.cpu.linear import ThreadLayer, by_columns, few_rows
from kernels_tvm.cpu.normalization import load_normalized
from kernels_tvm.cpu.targets import Target
from kernels_tvm.cpu.tiles import rows_together
from kernels_tvm.descriptions import LANES, MlpDescription, round_up
from kernels_tvm.emit import Arguments, kernel, otherwise, part, when

MANY_TOKENS = 64  # of a thread, for which it decodes all weights


def mlp_kernel(target: Target, threads: int, mlp: MlpDescription):
    """From x [images, tokens, channels], the parameters -> y [images, tokens, channels]."""
    few = few_rows(mlp.tokens, mlp.fc1) and mlp.tokens < MANY_TOKENS * threads
    emit = _by_columns if few else _by_strips
    return emit(target, threads, mlp)


def _by_columns(target, threads, mlp):
    channels, hidden = mlp.fc1.inputs, mlp.fc1.outputs
    height, width = mlp.grid or (mlp.tokens, 1)
    margin = 1 if mlp.grid else 0
    padded_width, padded = width + 2 * margin, (height + 2 * margin) * (width + 2 * margin)
    at_once = max(1, target.strip_bytes // (4 * padded * hidden))
    limit = at_once * mlp.tokens
    group = _group(target, width) if mlp.grid else 1
    together = rows_together(mlp.tokens)

    def body(arguments: Arguments):
        x = arguments("x", ("images", mlp.tokens, channels), "float32")
        buffers = arguments.parameters(mlp)
        y = arguments("y", ("images", mlp.tokens, channels), "float32")
        images = arguments.symbols["images"]
        expanded = scratch(at_once * padded * hidden)
        activated = scratch(limit * hidden)
        if margin:
            lines = height + 2 * margin
            with T.parallel(0, at_once * lines) as number:
                line, start = T.bind(T.floormod(number, lines)), T.bind(number * (padded_width * hidden))
                outside = T.bind(T.Or(line == 0, line == height + margin))
                with when(outside):
                    _clear_line(expanded, start, padded_width, hidden)
                with otherwise(outside):
                    _clear_sides(expanded, start, padded_width, hidden)

        with turns(images, at_once) as (first, present):
            count = T.bind(present * mlp.tokens)

            def place(row):
                image, token = split(row, mlp.tokens)
                return T.bind(first + image), token

            def around(row):
                """The places to the left of a token: in the padded line above, its own, and below."""
                image, token = split(row, mlp.tokens)
                line, column = split(token, width)
                above = T.bind((image * padded + line * padded_width) * hidden + column * LANES)
                return [T.bind(above + dy * padded_width * hidden) for dy in range(1 + 2 * margin)]

            def load_rows(row, buffer, offset):
                load_normalized(together, x, *place(row), channels, buffers, mlp.epsilon, buffer, offset)

            def store_expanded(row, column, value, lanes_):
                value = T.max(value, constant(0)) if mlp.relu else value
                at = T.bind(around(row)[margin] + margin * LANES)
                T.buffer_store(expanded, value, [lanes(at + column * padded_width)])

            parameters = part(buffers, "fc1_")
            by_columns(
                target, threads, mlp.fc1, parameters, limit, count, load_rows, store_expanded, together
            )
            claims = Claims(target, T.bind(T.floordiv(count, group)), threads)
            with T.parallel(0, threads) as thread, claims.of(thread) as number:
                row = T.bind(number * group)
                _activate(target, mlp, buffers, expanded, around(row), group, activated, row * hidden)

            def load_activated(row, buffer, offset):
                with T.serial(0, together * hidden // LANES) as vector:
                    value = activated[lanes(row * hidden + vector * LANES)]
                    T.buffer_store(buffer, value, [lanes(offset + vector * LANES)])

            def store(row, column, value, lanes_):
                image, token = place(row)
                store_lanes(y, value + x[image, token, lanes(column)], [image, token], column, lanes_)

            parameters = part(buffers, "fc2_")
            by_columns(target, threads, mlp.fc2, parameters, limit, count, load_activated, store, together)

    return kernel(body)


def _activate(target, mlp, buffers, expanded, places, group, buffer, offset):
    """Write the GELU of ``group`` neighbours after their convolution, or of one token without a grid."""
    hidden = mlp.fc1.outputs
    if not mlp.grid:
        with T.serial(0, hidden // LANES) as vector:
            value = expanded[lanes(places[0] + vector * LANES)]
            T.buffer_store(buffer, gelu(target, value), [lanes(offset + vector * LANES)])
        return
    convolve_tokens(
        expanded,
        places,
        group,
        hidden,
        mlp.grid[1] + 2,
        buffers["conv_kernel"],
        buffers["conv_bias"],
        lambda member, column, value: T.buffer_store(
            buffer, gelu(target, value), [lanes(offset + member * hidden + column)]
        ),
    )


def _by_strips(target, threads, mlp):
    channels, hidden = mlp.fc1.inputs, mlp.fc1.outputs
    height, width = mlp.grid or (mlp.tokens, 1)
    margin = 1 if mlp.grid else 0  # rows and columns of neighbours
    padded_width = width + 2 * margin
    strips = _strips(target, mlp, threads)
    strip = -(-height // strips)
    held = strip + 2 * margin  # rows of hidden activations
    group = _group(target, width) if mlp.grid else 1
    together = rows_together(width)

    def top(number):
        """The first row of a strip."""
        return T.bind(T.floordiv(number * height, strips))

    def body(arguments: Arguments):
        x = arguments("x", ("images", mlp.tokens, channels), "float32")
        buffers = arguments.parameters(mlp)
        y = arguments("y", ("images", mlp.tokens, channels), "float32")

        claims = Claims(target, arguments.symbols["images"] * strips, threads)
        with T.parallel(0, threads) as thread:
            fc1, fc2 = (
                ThreadLayer(target, getattr(mlp, name), part(buffers, f"{name}_"), keep=strips > threads)
                for name in ("fc1", "fc2")
            )
            between = scratch(held * padded_width * hidden)
            if margin:
                with T.serial(0, held) as line:
                    _clear_sides(between, line * (padded_width * hidden), padded_width, hidden)
            below = local(1, "int32")  # the number of the strip after the one that `between` holds
            T.buffer_store(below, T.int32(0), [0])

            with claims.of(thread) as claimed:
                image, number = split(claimed, strips)
                first = top(number)
                rows = T.bind(top(number + 1) - first)
                # Line i of the strip is row `above + i` of the grid.
                above = T.bind(first - margin)
                kept = T.bind(T.Select(T.And(number > 0, claimed == below[0]), 2 * margin, 0))
                T.buffer_store(below, claimed + 1, [0])
                start = T.bind(T.max(kept, 0 - above))
                stop = T.bind(T.min(rows + 2 * margin, height - above))

                def place(line):
                    """Where a line of the strip begins; a row of the grid keeps its place while held."""
                    return T.bind(T.floormod(first + line, held) * (padded_width * hidden))

                # Lines above and below the grid are zeros.
                for begin, end in ((kept, start), (stop, T.bind(rows + 2 * margin))):
                    with T.serial(0, T.max(end - begin, 0)) as outside:
                        _clear_line(between, place(T.bind(begin + outside)), padded_width, hidden)

                def load_rows(row, buffer, offset):
                    token = T.bind((above + start) * width + row)
                    load_normalized(together, x, image, token, channels, buffers, mlp.epsilon, buffer, offset)

                def place_hidden(row):
                    line, beside = split(row, width)
                    return T.bind(place(T.bind(start + line)) + (beside + margin) * LANES)

                def store_hidden(place, column, value, lanes_):
                    value = T.max(value, constant(0)) if mlp.relu else value
                    T.buffer_store(between, value, [lanes(place + column * padded_width)])

                fc1.tile(
                    held * width,
                    T.bind(T.max(stop - start, 0) * width),
                    load_rows,
                    store_hidden,
                    together,
                    place_hidden,
                )

                def load_activated(row, buffer, offset):
                    line, beside = split(row, width)
                    places = [
                        T.bind(place(T.bind(line + dy)) + beside * LANES) for dy in range(1 + 2 * margin)
                    ]
                    _activate(target, mlp, buffers, between, places, group, buffer, offset)

                def store(row, column, value, lanes_):
                    token = T.bind(first * width + row)
                    value = value + x[image, token, lanes(column)]
                    store_lanes(y, value, [image, token], column, lanes_)

                fc2.tile(strip * width, T.bind(rows * width), load_activated, store, group)

    return kernel(body)


def _strips(target: Target, mlp: MlpDescription, threads: int) -> int:
    """The number of strips of rows: each fits the cache, and all threads have equally many.

    A thread's only strip may be twice as large: then no weight is decoded or fetched a second time.
    """
    height, width = mlp.grid or (mlp.tokens, 1)
    margin = 1 if mlp.grid else 0
    row_bytes = 4 * (width + 2 * margin) * mlp.fc1.outputs
    if (-(-height // threads) + 2 * margin) * row_bytes <= 2 * target.strip_bytes:
        return min(threads, height)
    fits = max(1, target.strip_bytes // row_bytes - 2 * margin)
    return min(round_up(-(-height // fits), threads), height)


def _group(target: Target, width: int) -> int:
    """How many neighbouring tokens are convolved together: a divisor of the width."""
    return max(size for size in range(1, target.convolved_tokens + 1) if width % size == 0)


def _clear_line(buffer, start, width, hidden):
    with T.serial(0, width * hidden // LANES) as vector:
        T.buffer_store(buffer, constant(0), [lanes(start + vector * LANES)])


def _clear_sides(buffer, start, width, hidden):
    """Set the first and the last token of a line to 0."""
    with T.serial(0, hidden // LANES) as block:
        for column in (0, width - 1):
            T.buffer_store(buffer, constant(0), [lanes(start + (block * width + column) * LANES)])
