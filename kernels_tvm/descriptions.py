"""What the kernels compute: descriptions that are hashable, need no TVM and list the arrays of parameters.

Kernels for CPUs take all parameters but the weights of linear layers as one array, see `joined`.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Literal

from kernels_tvm.hadamard import ORDERS, orders
from kernels_tvm.packing import TILE_BYTES, blocked_shape, packed_shape

LANES = 16  # of a vector, on every target
WEIGHTS = ("blocks", "codes")  # how the names of linear layers' weights end
LARGEST_HADAMARD = 8192  # numbers of a transform: a GPU's block holds them in 32 KiB of shared memory
VALUE_TAPS = 9  # tokens that the convolution of the attention's values spans

Parameter = tuple[str, tuple[int, ...], str]  # name, shape and dtype


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is no smaller than ``value``."""
    return -(-value // multiple) * multiple


def joined(description) -> tuple[dict[str, int], int]:
    """Where each parameter starts in the one float32 array that CPU kernels take, and the array's size.

    The array holds all parameters but the weights of linear layers, which are too large to be copied. It
    saves
    time: XLA handles each array of a program in every call, and the kernel checks it. One array for each
    parameter took 0.3 ms of pvt_v2_b0's 7 ms.
    """
    starts, size = {}, 0
    for name, shape, _ in description.arguments():
        if not name.endswith(WEIGHTS):
            starts[name] = size
            size += round_up(math.prod(shape), LANES)
    return starts, size


class Description:
    """What a kernel computes."""

    def why_not(self) -> str | None:
        """Why no kernel computes it, None if one does."""
        return None


def _check_vectors(what: str, *sizes: int) -> str | None:
    """Why whole vectors of sizes have no kernel, None if they are multiples of `LANES`."""
    odd = [size for size in sizes if size % LANES]
    return f"its kernel computes {what} in multiples of {LANES}, not {odd[0]}" if odd else None


@dataclass(frozen=True)
class LinearDescription(Description):
    """What a linear layer computes.

    Attributes:
      kind: ``"dense"``, ``"shift"`` or ``"moe"``. A mixture (``"moe"``) has weights of both kinds; the router
        chooses one for each row, and its probability scales the result.
      inputs: channels of a row.
      outputs: channels of a result.
      bits: of a packed weight of powers of two: 4 or 5 for one power, 8 for a sum or difference of two.
      activations: number format of the rows that such weights take: ``"float"``, or ``"int8"`` (each row
        scaled to its largest magnitude), which needs 4 or 8 bits; ``"fixed_point"`` has no kernel.
      shifts: whether int8 products are shifts and additions instead of multiplications. On GPUs it also makes
        float32 products with single powers additions to exponents.
      precision: number format of the factors of dense products. With ``"int8"`` rows are scaled to their
        largest magnitude, weights have a scale for each output, and sums are int32; else sums are float32.
    """

    kind: Literal["dense", "shift", "moe"]
    inputs: int
    outputs: int
    bits: int = 5
    activations: Literal["float", "int8", "fixed_point"] = "float"
    shifts: bool = False
    precision: Literal["float32", "bfloat16", "int8"] = "float32"

    @property
    def experts(self) -> tuple[str, ...]:
        """The kinds of weights that the layer has."""
        return ("dense", "shift") if self.kind == "moe" else (self.kind,)

    @property
    def width(self) -> int:
        """``inputs`` rounded up to whole vectors: the stride of a row in scratch memory."""
        return round_up(self.inputs, LANES)

    @property
    def row_bytes(self) -> int:
        """Bytes that a row takes in the cache."""
        return 4 * self.width

    def why_not(self) -> str | None:
        """Why no kernel computes it, None if one does."""
        if "shift" in self.experts and self.activations == "fixed_point":
            return "there is no kernel for fixed-point activations"
        if "shift" in self.experts and self.bits not in TILE_BYTES:
            return "packed powers of two have at most 5 bits"
        return None

    def arguments(self) -> list[Parameter]:
        """Name, shape and dtype of each parameter, in the order in which kernels take them.

        Outputs are padded to whole vectors. The dtype of bfloat16 weights is uint16: their bits.
        """
        width = round_up(self.outputs, LANES)
        blocks = blocked_shape(self.inputs, self.outputs)
        weights: dict[str, list[Parameter]] = {
            "float32": [("blocks", blocks, "float32")],
            "bfloat16": [("blocks", blocks, "uint16")],
            "int8": [
                ("blocks", packed_shape(self.inputs, self.outputs, 8), "int8"),
                ("scale", (width,), "float32"),
            ],
        }
        dense: list[Parameter] = [*weights[self.precision], ("bias", (width,), "float32")]
        codes = "int8" if self.bits == 8 else "uint8"
        shift: list[Parameter] = [
            ("codes", packed_shape(self.inputs, self.outputs, self.bits), codes),
            ("exponent", (width,), "int8"),
            ("shift_bias", (width,), "float32"),
        ]
        router: list[Parameter] = [
            ("router_kernel", (self.inputs, 2), "float32"),
            ("router_bias", (2,), "float32"),
        ]
        return {"dense": dense, "shift": shift, "moe": router + dense + shift}[self.kind]


def _prefixed(name, linear):
    return [(f"{name}_{argument}", shape, dtype) for argument, shape, dtype in linear.arguments()]


def _layer_norm(name, channels):
    return [(f"{name}_{parameter}", (channels,), "float32") for parameter in ("scale", "bias")]


@dataclass(frozen=True)
class MlpDescription(Description):
    """What an MLP computes. Channels and hidden channels are multiples of 16.

    Attributes:
      fc1: the layer that expands.
      fc2: the layer that contracts.
      epsilon: of the LayerNorm.
      tokens: of an image.
      grid: height and width of the grid of tokens, for a depthwise convolution of 3 x 3; None for no
        convolution.
      relu: whether a ReLU comes right after the first layer.
    """

    fc1: LinearDescription
    fc2: LinearDescription
    epsilon: float
    tokens: int
    grid: tuple[int, int] | None = None
    relu: bool = False

    def why_not(self) -> str | None:
        """Why no kernel computes it, None if one does."""
        sizes = _check_vectors("channels", self.fc1.inputs, self.fc1.outputs)
        return sizes or self.fc1.why_not() or self.fc2.why_not()

    def arguments(self) -> list[Parameter]:
        """Name, shape and dtype of each parameter, in the order in which the kernel takes them."""
        channels, hidden = self.fc1.inputs, self.fc1.outputs
        norm = _layer_norm("norm", channels)
        conv = [("conv_kernel", (9, hidden), "float32"), ("conv_bias", (hidden,), "float32")]
        return norm + _prefixed("fc1", self.fc1) + (conv if self.grid else []) + _prefixed("fc2", self.fc2)


@dataclass(frozen=True)
class AttentionDescription(Description):
    """What every attention with a kernel computes from. Channels are a multiple of 16, head_dim of 8.

    Attributes:
      qkv: the layer that makes queries, keys and values.
      proj: the layer after the attention.
      heads: attention heads.
      tokens: of an image.
      epsilon: of the LayerNorm.
    """

    qkv: LinearDescription
    proj: LinearDescription
    heads: int
    tokens: int
    epsilon: float

    @property
    def channels(self) -> int:
        """Channels of a token."""
        return self.proj.outputs

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.channels // self.heads

    def why_not(self) -> str | None:
        """Why no kernel computes it, None if one does."""
        if self.channels % self.heads or self.head_dim % 8:
            return (
                f"its kernel splits channels into heads of a multiple of 8, not {self.channels}/{self.heads}"
            )
        return _check_vectors("channels", self.channels) or self.qkv.why_not() or self.proj.why_not()

    def arguments(self) -> list[Parameter]:
        """Name, shape and dtype of each parameter, in the order in which the kernel takes them."""
        norm, own = _layer_norm("norm", self.channels), self.own_arguments()
        return norm + _prefixed("qkv", self.qkv) + own + _prefixed("proj", self.proj)

    def own_arguments(self) -> list[Parameter]:
        """The parameters of what is between the two layers."""
        return []


@dataclass(frozen=True)
class SoftmaxAttentionDescription(AttentionDescription):
    """What softmax attention computes."""


@dataclass(frozen=True)
class HammingLinearDescription(AttentionDescription):
    """What linear attention in Hamming space computes.

    Attributes:
      sample_threshold: whether the threshold of a code is the mean over its image and head; otherwise it
        is 0.
    """

    sample_threshold: bool

    def own_arguments(self) -> list[Parameter]:
        """The kernel of the convolution of the values over the tokens."""
        return [("value_kernel", (VALUE_TAPS, self.heads), "float32")]


@dataclass(frozen=True)
class BinarySoftmaxDescription(AttentionDescription):
    """What softmax attention of binary queries and keys computes.

    Attributes:
      sample_threshold: whether the threshold of a code is the mean over its image and head; otherwise it
        is 0.
      grid: height and width of the grid of the last tokens, for scores that are scaled by the mean magnitudes
        of an image's and head's queries and keys and have a bias for each relative position; None for scores
        that are neither.
    """

    sample_threshold: bool
    grid: tuple[int, int] | None = None

    @property
    def first(self) -> int:
        """Tokens before the grid."""
        return 0 if self.grid is None else self.tokens - math.prod(self.grid)

    def own_arguments(self) -> list[Parameter]:
        """The biases of a head: for each place of a key minus that of a query, row by row, and three more.

        These are for the pairs of a token before the grid with one of the grid, the reverse, and for those of
        two tokens before the grid.
        """
        if self.grid is None:
            return []
        height, width = self.grid
        return [("position_bias", (self.heads, (2 * height - 1) * (2 * width - 1) + 3), "float32")]


@dataclass(frozen=True)
class MatAddDescription(Description):
    """A product with codes 0, 1 and -1.

    Attributes:
      inner: how many values an output chooses from.
      columns: outputs of a row.
      dtype: of codes and values: ``"float32"``, or ``"int8"`` with int32 sums; others have no kernel.
    """

    inner: int
    columns: int
    dtype: str = "float32"

    def why_not(self) -> str | None:
        """Why no kernel computes it, None if one does."""
        if self.dtype in ("float32", "int8"):
            return None
        return f"its kernel adds float32 or int8 values, not {self.dtype}"


@dataclass(frozen=True)
class HammingProductDescription(Description):
    """Products of binary codes of -1 and 1, given as bits.

    Attributes:
      length: of a code.
    """

    length: int

    @property
    def words(self) -> int:
        """Words of 32 bits that hold a code."""
        return -(-self.length // 32)


@dataclass(frozen=True)
class HadamardDescription(Description):
    """Products with the symmetric matrix of -1 and 1 that is H kron S.

    H is the Hadamard matrix of ``order``, see `kernels_tvm.hadamard.conference_matrix`, and S is Sylvester's,
    of ``power``.

    Attributes:
      size: of a row: ``order`` times ``power``.
    """

    size: int

    def __post_init__(self):
        if not orders(self.size):
            raise ValueError(
                f"no Hadamard matrix of size {self.size} here; take a power of two, or one times "
                f"{', '.join(map(str, ORDERS))}: {_nearest_sizes(self.size)}"
            )

    @property
    def order(self) -> int:
        """Of the matrix that is not made of powers of two: 12, 20 or 28, or 1 if there is none."""
        return orders(self.size)[0]

    @property
    def power(self) -> int:
        """The power of two that is the rest of the size."""
        return self.size // self.order

    def why_not(self) -> str | None:
        """Why no kernel computes it, None if one does."""
        if self.size <= LARGEST_HADAMARD:
            return None
        return f"its kernel transforms at most {LARGEST_HADAMARD} numbers, not {self.size}"


def _nearest_sizes(size: int) -> str:
    """The sizes of Hadamard matrices on both sides of ``size``."""
    below = next((number for number in range(size, 0, -1) if orders(number)), None)
    above = next(number for number in itertools.count(max(size, 1)) if orders(number))
    return f"{above}" if below is None else f"{below} or {above}"


@dataclass(frozen=True)
class BinarizeDescription(Description):
    """Codes of values: ``high`` above the threshold, else ``low``.

    Attributes:
      channels: of a row.
      sample_threshold: whether the threshold is the mean over an element of the batch; otherwise it is 0.
      low: the lower code.
      high: the upper code.
      packed: whether the codes become bits, with 1 for the upper code, instead of numbers.
    """

    channels: int
    sample_threshold: bool
    low: float = 0.0
    high: float = 1.0
    packed: bool = False


@dataclass(frozen=True)
class DepthwiseConvDescription(Description):
    """A depthwise convolution, zero-padded to the same size.

    Attributes:
      height: rows of the grid.
      width: columns of the grid.
      channels: of a token.
      kernel: rows and columns of the kernel, both odd.
      gelu: whether a bias and a GELU follow.
    """

    height: int
    width: int
    channels: int
    kernel: tuple[int, int]
    gelu: bool = False


@dataclass(frozen=True)
class PatchEmbedDescription(Description):
    """A strided convolution, then a LayerNorm; where patches overlap, it is zero-padded by half a patch.

    Attributes:
      projection: the product with a patch, its channels last; its outputs are a multiple of 16.
      height: of the images, in pixels.
      width: of the images, in pixels.
      channels: of a pixel; with an input LayerNorm a multiple of 16.
      patch: side of a patch.
      stride: pixels from one patch to the next.
      epsilon: of the LayerNorm; None for none.
      input_epsilon: of a LayerNorm of each pixel before the convolution; None for none.
    """

    projection: LinearDescription
    height: int
    width: int
    channels: int
    patch: int
    stride: int
    epsilon: float | None
    input_epsilon: float | None = None

    @property
    def padding(self) -> int:
        """Zeros on each side of an image."""
        return self.patch // 2 if self.patch > self.stride else 0

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        rows, columns = (
            (side + 2 * self.padding - self.patch) // self.stride + 1 for side in (self.height, self.width)
        )
        return rows, columns

    def why_not(self) -> str | None:
        """Why no kernel computes it, None if one does."""
        normalized = () if self.input_epsilon is None else (self.channels,)
        return _check_vectors("channels", self.projection.outputs, *normalized)

    def arguments(self) -> list[Parameter]:
        """Name, shape and dtype of each parameter, in the order in which the kernel takes them."""
        input_norm = _layer_norm("input_norm", self.channels) if self.input_epsilon is not None else []
        norm = _layer_norm("norm", self.projection.outputs) if self.epsilon is not None else []
        return input_norm + _prefixed("projection", self.projection) + norm


@dataclass(frozen=True)
class HeadDescription(Description):
    """A LayerNorm of each token, the mean of an image's tokens, and a linear layer.

    Attributes:
      projection: the layer; its inputs are a multiple of 16.
      tokens: of an image.
      epsilon: of the LayerNorm.
    """

    projection: LinearDescription
    tokens: int
    epsilon: float

    def why_not(self) -> str | None:
        """Why no kernel computes it, None if one does."""
        return _check_vectors("channels", self.projection.inputs)

    def arguments(self) -> list[Parameter]:
        """Name, shape and dtype of each parameter, in the order in which the kernel takes them."""
        norm = _layer_norm("norm", self.projection.inputs)
        return norm + _prefixed("projection", self.projection)
