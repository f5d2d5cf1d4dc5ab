"""A mixture of experts on GPUs: the device sorts rows by expert, then each expert computes its own rows.

Only the device knows how many rows an expert has. So both experts are launched for all rows, and blocks
beyond an expert's rows return at once: the cost falls with the rows, and no row is dropped.
"""

from tvm.script.ir_builder import tirx as T

from kernels_tvm.descriptions import LinearDescription
from kernels_tvm.emit import otherwise, when
from kernels_tvm.gpu import matshift
from kernels_tvm.gpu.emit import barrier, fill, launch, registers, shared
from kernels_tvm.gpu.matshift import Results, launch_expert, layer_kernel, load_four
from kernels_tvm.gpu.products import THREADS
from kernels_tvm.gpu.targets import GpuTarget
from kernels_tvm.gpu.tiles import Rows

SORTED_ROWS = 128  # that a block sorts
ROUTING = 8  # threads that share a row
TOGETHER = THREADS // ROUTING  # rows that a block routes at once


def scratch(linear: LinearDescription, rows) -> list[tuple[str, tuple, str]]:
    """Name, shape and dtype of the arrays that pass from launch to launch; ``rows`` is a number or symbol.

    ``logit`` is the router's logit for the dense expert minus that for the shift expert. ``dense_counts`` has
    the number of the dense expert's rows among each `SORTED_ROWS`, and ``dense_rows`` their total. ``order``
    lists the dense expert's rows, then the others.
    """
    routing = [
        ("logit", (rows,), "float32"),
        ("dense_counts", (rows,), "int32"),
        ("dense_rows", (1,), "int32"),
        ("order", (rows,), "int32"),
    ]
    return routing + matshift.scratch(linear, rows)


def moe_kernel(target: GpuTarget, linear: LinearDescription):
    """Each row of ``y`` is its expert's result times the router's probability.

    x [rows, inputs] float32, the parameters, scratch, y [rows, outputs] float32.
    """

    def body(x, buffers, y, limit):
        def gate(row):
            return T.float32(1) / (T.float32(1) + T.exp(T.float32(0) - T.fabs(buffers["logit"][row])))

        def dense():
            return Rows(T.bind(buffers["dense_rows"][0]), buffers["order"])

        def shift():
            start = T.bind(buffers["dense_rows"][0])
            return Rows(T.bind(limit - start), buffers["order"], start)

        _launch_router(linear, x, buffers, limit)
        _launch_sort(buffers, limit)
        for kind, rows in (("dense", dense), ("shift", shift)):
            launch_expert(target, linear, kind, x, buffers, Results(y, limit, rows, gate))

    return layer_kernel(linear, scratch(linear, "rows"), body)


def _launch_router(linear, x, buffers, limit):
    """Launch the router: it writes each row's logit, and each block's number of the dense expert's rows."""
    with launch(THREADS, T.ceildiv(limit, SORTED_ROWS)) as (block, _, thread):
        weights = shared((linear.width,))
        parts, counts = shared((TOGETHER, ROUTING)), shared((TOGETHER,), "int32")
        with T.serial(0, T.ceildiv(linear.width - thread, THREADS)) as turn:
            k = T.bind(turn * THREADS + thread)
            T.buffer_store(weights, T.float32(0), [k])
            with when(k < linear.inputs):
                router = buffers["router_kernel"]
                T.buffer_store(weights, router[k, 0] - router[k, 1], [k])
        barrier()
        row, lane = T.bind(thread // ROUTING), T.bind(thread % ROUTING)
        count, total, four = registers(1, "int32"), registers(1), registers(4)
        T.buffer_store(count, T.int32(0), [0])
        with T.serial(0, SORTED_ROWS // TOGETHER) as turn:
            first = T.bind(block * SORTED_ROWS + turn * TOGETHER)
            T.buffer_store(total, T.float32(0), [0])
            with (
                when(first + row < limit),
                T.serial(0, T.ceildiv(linear.width // 4 - lane, ROUTING)) as step,
            ):
                column = T.bind((step * ROUTING + lane) * 4)
                load_four(x, first + row, column, four)
                for i in range(4):
                    T.buffer_store(total, total[0] + four[i] * weights[column + i], [0])
            T.buffer_store(parts, total[0], [row, lane])
            barrier()
            with when(T.And(thread < TOGETHER, first + thread < limit)):
                bias = buffers["router_bias"]
                T.buffer_store(total, bias[0] - bias[1], [0])
                with T.unroll(0, ROUTING) as part:
                    T.buffer_store(total, total[0] + parts[thread, part], [0])
                T.buffer_store(buffers["logit"], total[0], [first + thread])
                # Of equal logits the first expert wins, as in `jax.lax.top_k`.
                T.buffer_store(count, count[0] + T.Cast("int32", total[0] >= T.float32(0)), [0])
            barrier()
        with when(thread < TOGETHER):
            T.buffer_store(counts, count[0], [thread])
        barrier()
        with when(thread == 0):
            T.buffer_store(count, T.int32(0), [0])
            with T.serial(0, TOGETHER) as part:
                T.buffer_store(count, count[0] + counts[part], [0])
            T.buffer_store(buffers["dense_counts"], count[0], [block])


def _launch_sort(buffers, limit):
    """Launch the sort: it writes each row to ``order``, after the earlier rows of its expert."""
    blocks = T.ceildiv(limit, SORTED_ROWS)
    with launch(THREADS, blocks) as (block, _, thread):
        sums, is_dense = shared((2, THREADS), "int32"), shared((SORTED_ROWS,), "int32")
        # Rows of the dense expert in the blocks before this one, and in all blocks.
        counts = registers(2, "int32")
        fill(counts, T.int32(0), 2)
        with T.serial(0, T.ceildiv(T.max(blocks - thread, 0), THREADS)) as turn:
            other = T.bind(turn * THREADS + thread)
            rows = T.bind(buffers["dense_counts"][other])
            T.buffer_store(counts, counts[0] + T.Select(other < block, rows, T.int32(0)), [0])
            T.buffer_store(counts, counts[1] + rows, [1])
        for i in range(2):
            T.buffer_store(sums, counts[i], [i, thread])
        first = T.bind(block * SORTED_ROWS)
        with when(thread < SORTED_ROWS):
            T.buffer_store(is_dense, T.int32(0), [thread])
            with when(first + thread < limit):
                T.buffer_store(
                    is_dense, T.Cast("int32", buffers["logit"][first + thread] >= T.float32(0)), [thread]
                )
        barrier()
        half = THREADS // 2
        while half:
            with when(thread < half):
                for i in range(2):
                    T.buffer_store(sums, sums[i, thread] + sums[i, thread + half], [i, thread])
            barrier()
            half //= 2
        before, all_dense = T.bind(sums[0, 0]), T.bind(sums[1, 0])
        with when(T.And(block == 0, thread == 0)):
            T.buffer_store(buffers["dense_rows"], all_dense, [0])
        with when(T.And(thread < SORTED_ROWS, first + thread < limit)):
            rank = registers(1, "int32")
            T.buffer_store(rank, before, [0])
            with T.serial(0, thread) as other:
                T.buffer_store(rank, rank[0] + is_dense[other], [0])
            dense = T.bind(is_dense[thread] == 1)
            with when(dense):
                T.buffer_store(buffers["order"], first + thread, [rank[0]])
            with otherwise(dense):
                T.buffer_store(buffers["order"], first + thread, [all_dense + first + thread - rank[0]])
