"""MatAdd: sums of values that the codes 0, 1 and -1 choose."""

from tvm.script.ir_builder import tirx as T

from kernels_tvm.cpu.emit import lanes, load_lanes, local, splat, split, store_lanes
from kernels_tvm.cpu.targets import Target
from kernels_tvm.descriptions import LANES, MatAddDescription
from kernels_tvm.emit import Arguments, kernel, when

ROWS = 4  # computed together: they share the values that they add


def matadd_kernel(target: Target, threads: int, matadd: MatAddDescription):
    """From codes [batch, rows, inner], values [batch, inner, columns] -> [batch, rows, columns].

    Each output starts at 0; values are added to it and subtracted from it, and nothing is multiplied.
    """
    inner, columns, dtype = matadd.inner, matadd.columns, matadd.dtype
    sum_dtype = "int32" if dtype == "int8" else "float32"
    vector, scalar = f"{sum_dtype}x{LANES}", getattr(T, dtype)
    vectors = 1 if target.float_tile[1] == LANES else 4

    def body(arguments: Arguments):
        codes = arguments("codes", ("batch", "rows", inner), dtype)
        values = arguments("values", ("batch", inner, columns), dtype)
        y = arguments("y", ("batch", "rows", columns), sum_dtype)
        rows = arguments.symbols["rows"]
        blocks = T.bind(T.ceildiv(rows, ROWS))

        def panel(image, first, column, counts):
            # The last block's surplus rows repeat the last one.
            row = [T.bind(T.min(first + i, rows - 1)) for i in range(ROWS)]
            sums = local(ROWS * len(counts) * LANES, sum_dtype)
            for index in range(ROWS * len(counts)):
                T.buffer_store(sums, splat(getattr(T, sum_dtype)(0)), [lanes(index * LANES)])
            with T.serial(0, inner) as k:
                added = [
                    T.bind(T.Cast(vector, load_lanes(values, [image, k], column + j * LANES, count)))
                    for j, count in enumerate(counts)
                ]
                for i in range(ROWS):
                    code = T.bind(splat(codes[image, row[i], k]))
                    plus, minus = code > splat(scalar(0)), code < splat(scalar(0))
                    for j in range(len(counts)):
                        at = lanes((i * len(counts) + j) * LANES)
                        T.buffer_store(sums, T.Select(plus, sums[at] + added[j], sums[at]), [at])
                        T.buffer_store(sums, T.Select(minus, sums[at] - added[j], sums[at]), [at])
            for i in range(ROWS):
                with when(first + i < rows):
                    for j, count in enumerate(counts):
                        value = sums[lanes((i * len(counts) + j) * LANES)]
                        store_lanes(y, value, [image, first + i], column + j * LANES, count)

        with T.parallel(0, arguments.symbols["batch"] * blocks) as task:
            image, block = split(task, blocks)
            first = T.bind(block * ROWS)
            width = vectors * LANES
            if columns >= width:
                with T.serial(0, columns // width) as number:
                    panel(image, first, number * width, [LANES] * vectors)
            rest = columns % width
            if rest:
                counts = [min(LANES, rest - start) for start in range(0, rest, LANES)]
                panel(image, first, columns - rest, counts)

    return kernel(body)
