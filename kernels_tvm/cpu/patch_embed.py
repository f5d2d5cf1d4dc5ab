"""A patch embedding as a product of patches: norm(convolution(input_norm(x))), with or without the norms."""

from tvm.script.ir_builder import tirx as T

from kernels_tvm.cpu.emit import constant, for_each_row, lanes, split
from kernels_tvm.cpu.linear import apply_layer, few_rows
from kernels_tvm.cpu.normalization import layer_norm_rows
from kernels_tvm.cpu.targets import Target
from kernels_tvm.cpu.tiles import rows_together
from kernels_tvm.descriptions import LANES, PatchEmbedDescription
from kernels_tvm.emit import Arguments, kernel, otherwise, part, when


def patch_embed_kernel(target: Target, threads: int, embed: PatchEmbedDescription):
    """From x [images, height * width * channels] and the parameters to y [images, tokens, features]."""
    rows, columns = embed.grid
    features = embed.projection.outputs
    epsilon, together = embed.epsilon, rows_together(rows * columns)

    def body(arguments: Arguments):
        x = arguments("x", ("images", embed.height * embed.width * embed.channels), "float32")
        buffers = arguments.parameters(embed)
        y = arguments("y", ("images", rows * columns, features), "float32")
        total = arguments.symbols["images"] * (rows * columns)

        def load_row(row, buffer, offset):
            load = _load_patch if embed.input_epsilon is None else _load_normalized_patch
            load(embed, x, buffers, *split(row, rows * columns), buffer, offset)

        def store(row, column, value, lanes_):
            image, token = split(row, rows * columns)
            T.buffer_store(y, value, [image, token, lanes(column)])

        few = few_rows(rows * columns, embed.projection)
        parameters = part(buffers, "projection_")
        apply_layer(target, threads, embed.projection, parameters, total, load_row, store, few)
        if epsilon is None:
            return

        def normalize(group):
            image, first = split(group * together, rows * columns)
            layer_norm_rows(
                together,
                lambda row, column: y[image, first + row, lanes(column)],
                features,
                buffers["norm_scale"],
                buffers["norm_bias"],
                epsilon,
                lambda row, column, value: T.buffer_store(y, value, [image, first + row, lanes(column)]),
            )

        groups = T.floordiv(total, together)
        for_each_row(target, groups, 4 * features * together, threads, normalize)

    return kernel(body)


def _corner(embed, token):
    """Row and column of a patch's first pixel."""
    return (T.bind(at * embed.stride - embed.padding) for at in split(token, embed.grid[1]))


def _load_normalized_patch(embed, x, buffers, image, token, buffer, offset):
    """Write the patch of a token as one row, each pixel normalized."""
    patch, channels = embed.patch, embed.channels
    top, left = _corner(embed, token)
    with T.serial(0, patch) as dy:
        row, start = T.bind(top + dy), T.bind(offset + dy * (patch * channels))
        line = T.bind(_nearest(row, embed.height) * embed.width)
        pixels = [T.bind((line + _nearest(left + dx, embed.width)) * channels) for dx in range(patch)]
        layer_norm_rows(
            patch,
            lambda dx, column, pixels=pixels: x[image, lanes(pixels[dx] + column)],
            channels,
            buffers["input_norm_scale"],
            buffers["input_norm_bias"],
            embed.input_epsilon,
            lambda dx, column, value, start=start: T.buffer_store(
                buffer, value, [lanes(start + dx * channels + column)]
            ),
        )
        for dx in range(patch):
            beyond = T.Or(_is_beyond(row, embed.height), _is_beyond(left + dx, embed.width))
            with when(beyond), T.serial(0, channels // LANES) as vector:
                at = lanes(start + dx * channels + vector * LANES)
                T.buffer_store(buffer, constant(0), [at])


def _nearest(place, size):
    """The place in an image that is nearest to ``place``, which may be beyond it."""
    return T.max(T.min(place, size - 1), 0)


def _is_beyond(place, size):
    return T.Or(place < 0, place >= size)


def _load_patch(embed, x, buffers, image, token, buffer, offset):
    """Write the patch of a token as one row."""
    segment = embed.patch * embed.channels
    top, left = _corner(embed, token)
    inside = T.bind(T.And(left >= 0, left + embed.patch <= embed.width))
    for column in range(embed.projection.inputs, embed.projection.width):
        T.buffer_store(buffer, T.float32(0), [offset + column])
    for dy in range(embed.patch):
        y = T.bind(top + dy)
        _copy_segment(embed, x, image, y, left, inside, buffer, offset + dy * segment, segment)


def _copy_segment(embed, x, image, y, left, inside, buffer, offset, size):
    """Write one row of a patch, with zeros where it reaches beyond the image."""
    line = (y * embed.width + left) * embed.channels
    reaches = T.bind(T.And(y >= 0, y < embed.height))
    if size >= LANES:
        # The last vector overlaps the one before it.
        starts = [*range(0, size - LANES, LANES), size - LANES]
        with when(T.And(reaches, inside)):
            for at in starts:
                T.buffer_store(buffer, x[image, lanes(line + at)], [lanes(offset + at)])
    with otherwise(T.And(reaches, inside) if size >= LANES else T.bool(False)):
        for dx in range(embed.patch):
            valid = T.And(reaches, T.And(left + dx >= 0, left + dx < embed.width))
            with T.serial(0, embed.channels) as channel:
                at = T.bind(dx * embed.channels + channel)
                value = T.if_then_else(valid, x[image, line + at], T.float32(0))
                T.buffer_store(buffer, value, [offset + at])
