"""A patch embedding: a strided convolution as a product of gathered patches, then a LayerNorm."""

from tvm.script.ir_builder import tirx as T

from kernels_tvm.descriptions import LANES, PatchEmbed
from kernels_tvm.emit import Arguments, kernel, lanes, otherwise, when
from kernels_tvm.linear import Layer, prepare_layers
from kernels_tvm.mlp import part
from kernels_tvm.normalization import layer_norm_row
from kernels_tvm.targets import Target


def patch_embed_kernel(target: Target, threads: int, embed: PatchEmbed):
    """From x [images, height * width * channels] and the parameters to y [images, tokens, features]."""
    rows, columns = embed.grid
    features, segment = embed.projection.outputs, embed.patch * embed.channels

    def body(arguments: Arguments):
        x = arguments("x", ("images", embed.height * embed.width * embed.channels), "float32")
        buffers = {name: arguments(name, shape, dtype) for name, shape, dtype in embed.arguments()}
        y = arguments("y", ("images", rows * columns, features), "float32")
        layer = Layer(target, embed.projection, part(buffers, "projection_"))
        prepare_layers([layer], threads)
        tiles = layer.row_tiles(arguments.symbols["images"] * (rows * columns), threads)
        with T.parallel(0, tiles.count) as tile:
            start, count = tiles[tile]

            def place(row):
                token = T.bind(start + row)
                return T.bind(T.floordiv(token, rows * columns)), T.bind(T.floormod(token, rows * columns))

            def load_row(row, buffer, offset):
                image, token = place(row)
                top = T.bind(T.floordiv(token, columns) * embed.stride - embed.padding)
                left = T.bind(T.floormod(token, columns) * embed.stride - embed.padding)
                inside = T.bind(T.And(left >= 0, left + embed.patch <= embed.width))
                for column in range(embed.projection.inputs, embed.projection.width):
                    T.buffer_store(buffer, T.float32(0), [offset + column])
                for dy in range(embed.patch):
                    _copy_segment(
                        embed,
                        x,
                        image,
                        T.bind(top + dy),
                        left,
                        inside,
                        buffer,
                        offset + dy * segment,
                        segment,
                    )

            def store(row, column, value, lanes_):
                image, token = place(row)
                T.buffer_store(y, value, [image, token, lanes(column)])

            layer.tile(tiles.limit, count, load_row, store)
            with T.serial(0, count) as row:
                image, token = place(row)
                layer_norm_row(
                    lambda column: y[image, token, lanes(column)],
                    features,
                    buffers["norm_scale"],
                    buffers["norm_bias"],
                    embed.epsilon,
                    lambda column, value: T.buffer_store(y, value, [image, token, lanes(column)]),
                )

    return kernel(body)


def _copy_segment(embed, x, image, y, left, inside, buffer, offset, size):
    """One row of a patch, with zeros where it reaches beyond the image."""
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
