"""The kinds of weights of a linear layer: how each is decoded, panel by panel, and multiplied with rows."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from tvm.script.ir_builder import tirx as T

from kernels_tvm.cpu.bfloat16 import from_bfloat16
from kernels_tvm.cpu.decoding import copy_int8, decode_float, decode_int8, decode_shifts, power_of_two
from kernels_tvm.cpu.emit import lanes, local, scratch, splat
from kernels_tvm.cpu.products import (
    FloatPanels,
    FloatRows,
    Int8Panels,
    Int8Rows,
    ShiftPanels,
    float_product,
    int8_product,
    shift_product,
)
from kernels_tvm.cpu.targets import for_whole_int8
from kernels_tvm.descriptions import LANES, round_up
from kernels_tvm.emit import when


def _for_each_panel(panels, share, body: Callable) -> None:
    """Emit ``body(panel, columns)`` for the panels whose numbers ``share`` yields, or for all without one.

    The number of the panel that is not whole is a Python integer.
    """
    with share or T.serial(0, panels.count) as panel:
        if panels.whole:
            with when(panel < panels.whole):
                body(panel, panels.columns)
        if panels.rest:
            with when(panel == panels.whole):
                body(panels.whole, panels.rest)


class Expert(ABC):
    """What the kinds of weights share: panels of weights, each decoded right before it is multiplied."""

    def __init__(self, target, linear, buffers, share, panels):
        self.target, self.linear, self.buffers = target, linear, buffers
        self.share, self.panels = share, panels
        self.decoded = local(1, "int32")
        T.buffer_store(self.decoded, T.int32(0), [0])

    @abstractmethod
    def prepare(self, panel, columns):
        """Decode the weights of a panel."""

    @abstractmethod
    def rows(self, capacity) -> Any:
        """Memory for as many rows, in the format that `product` reads."""

    @abstractmethod
    def product(self, rows, count, panel, columns, finish):
        """Emit the sums of ``count`` rows with a panel; ``finish(row, vector, sums)`` takes each vector."""

    @abstractmethod
    def result(self, rows, row, column, sums):
        """A vector of results from its sums."""

    def multiply(self, rows, count, store):
        """Emit the products of ``count`` rows; ``store`` takes the results, see `ThreadLayer.tile`."""

        def multiply(panel, columns):
            first = panel * self.panels.columns
            if self.panels.needed:
                with when(self.decoded[0] == 0):
                    self.prepare(panel, columns)

            def finish(row, vector, sums):
                column = first + vector * LANES
                valid = min(LANES, self.linear.outputs - column) if isinstance(panel, int) else LANES
                store(row, column, self.result(rows, row, column, sums), valid)

            self.product(rows, count, panel, columns, finish)

        _for_each_panel(self.panels, self.share, multiply)
        if self.panels.kept:
            T.buffer_store(self.decoded, T.int32(1), [0])


class DenseExpert(Expert):
    """Dense weights, in float32 or bfloat16."""

    def __init__(self, target, linear, buffers, keep, share, packed=False):
        given = None if packed else self.weights
        self.rounded = linear.precision == "bfloat16" and not packed
        # A power of two is a bfloat16 number; so is a sum or difference of two within seven octaves.
        exact = packed or self.rounded
        panels = FloatPanels(target, linear.inputs, linear.outputs, keep, exact, given)
        super().__init__(target, linear, buffers, share, panels)

    def weights(self, first):
        def load(k, vector):
            weights = self.buffers["blocks"][T.floordiv(first, LANES) + vector, k, lanes(0)]
            return from_bfloat16(weights) if self.rounded else weights

        return load

    def prepare(self, panel, columns):
        self.panels.write(panel, columns, self.weights(panel * self.panels.columns))

    def rows(self, capacity):
        return FloatRows(self.target, capacity, self.linear.width, self.rounded)

    def product(self, rows, count, panel, columns, finish):
        float_product(self.target, rows, count, self.panels, panel, columns, finish)

    def result(self, rows, row, column, sums):
        return sums + self.buffers["bias"][lanes(column)]


class FloatShiftExpert(DenseExpert):
    """Weights of powers of two that are decoded to floats."""

    def __init__(self, target, linear, buffers, keep, share):
        buffers = buffers | {"bias": buffers["shift_bias"]}
        super().__init__(target, linear, buffers, keep, share, packed=True)

    def prepare(self, panel, columns):
        decoded = scratch(round_up(self.linear.inputs, 4) * columns)
        decode_float(self.linear, self.buffers, panel * self.panels.columns, columns, decoded)
        self.panels.write(panel, columns, lambda k, vector: decoded[lanes(k * columns + vector * LANES)])


class Int8Expert(Expert):
    """Dense weights in int8 for int8 rows."""

    tiles, bias = "blocks", "bias"

    def __init__(self, target, linear, buffers, keep, share):
        self.is_whole = buffers[self.tiles].dtype == "int8"  # else codes of 4 bits
        target = for_whole_int8(target) if self.is_whole else target
        super().__init__(target, linear, buffers, share, self.panels_for(target, linear, keep))

    def panels_for(self, target, linear, keep) -> Any:
        """Memory for panels of decoded weights."""
        return Int8Panels(target, linear.inputs, linear.outputs, keep)

    def prepare(self, panel, columns):
        decode, first = copy_int8 if self.is_whole else decode_int8, panel * self.panels.columns
        decode(self.target, self.buffers[self.tiles], first, columns, self.panels, panel)
        self.panels.sum_columns(panel, columns)

    def rows(self, capacity):
        return Int8Rows(self.target, capacity, self.linear.width)

    def product(self, rows, count, panel, columns, finish):
        int8_product(self.target, rows, count, self.panels, panel, columns, finish)

    def scale(self, at):
        """The scales of a vector of outputs."""
        return self.buffers["scale"][at]

    def result(self, rows, row, column, sums):
        at = lanes(column)
        scale = self.scale(at) * splat(rows.scale[row])
        return T.Cast(f"float32x{LANES}", sums) * scale + self.buffers[self.bias][at]


class Int8ShiftExpert(Int8Expert):
    """Weights of powers of two for int8 rows, decoded to int8 numbers."""

    tiles, bias = "codes", "shift_bias"

    def __init__(self, target, linear, buffers, keep, share):
        super().__init__(target, linear, buffers, keep, share)
        self.scales = scratch(round_up(linear.outputs, LANES))  # 2^exponent of each output

    def prepare(self, panel, columns):
        self.prepare_scales(panel, columns)
        super().prepare(panel, columns)

    def prepare_scales(self, panel, columns):
        """Write the scales of a panel's outputs."""
        for vector in range(columns // LANES):
            at = lanes(panel * self.panels.columns + vector * LANES)
            exponent = T.Cast(f"int32x{LANES}", self.buffers["exponent"][at])
            T.buffer_store(self.scales, power_of_two(exponent), [at])

    def scale(self, at):
        return self.scales[at]


class ShiftedExpert(Int8ShiftExpert):
    """Weights of powers of two for int8 rows, decoded to shifts."""

    def panels_for(self, target, linear, keep):
        terms = 2 if self.is_whole else 1
        return ShiftPanels(target, linear.inputs, linear.outputs, keep, terms)

    def prepare(self, panel, columns):
        self.prepare_scales(panel, columns)
        first = panel * self.panels.columns
        decode_shifts(self.linear, self.buffers[self.tiles], first, columns, self.panels, panel)

    def product(self, rows, count, panel, columns, finish):
        shift_product(self.target, rows, count, self.panels, panel, columns, finish)
