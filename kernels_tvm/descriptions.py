"""What the kernels compute: each a description, hashable and free of TVM, with the arrays that it takes."""

from dataclasses import dataclass
from typing import Literal

from kernels_tvm.packing import packed_shape
from kernels_tvm.targets import Target

LANES = 16  # of a vector, on every target
CACHE_BYTES = 128 * 1024  # a tile of rows that a thread works on at once
VALUE_TAPS = 9  # tokens that the convolution of the values spans


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is no smaller than ``value``."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class Linear:
    """What a linear layer computes.

    Attributes:
      kind: ``"dense"``, ``"shift"`` or ``"moe"``: both, each row computed by the one that the router chose
        and scaled by the router's probability.
      inputs: channels of a row.
      outputs: channels of a result.
      bits: of a packed power-of-two weight, 4 or 5.
      activations: number format of what is shifted: ``"float"``, or ``"int8"`` (each row scaled to its largest
        magnitude), which needs 4 bits.
      shifts: whether int8 products are shifts and additions rather than multiplications by powers of two.
    """

    kind: Literal["dense", "shift", "moe"]
    inputs: int
    outputs: int
    bits: int = 5
    activations: Literal["float", "int8"] = "float"
    shifts: bool = False

    @property
    def width(self) -> int:
        """``inputs`` rounded up to whole vectors: the stride of a row in scratch memory."""
        return round_up(self.inputs, LANES)

    @property
    def row_bytes(self) -> int:
        """What a row takes in the cache."""
        return 4 * self.width

    def arguments(self) -> list[tuple[str, tuple[int, ...], str]]:
        """Name, shape and dtype of each parameter, in the order in which kernels take them.

        Outputs are padded to whole vectors.
        """
        width = round_up(self.outputs, LANES)
        dense = [("kernel", (self.inputs, width), "float32"), ("bias", (width,), "float32")]
        shift = [
            ("codes", packed_shape(self.inputs, self.outputs, self.bits), "uint8"),
            ("exponent", (width,), "int8"),
            ("shift_bias", (width,), "float32"),
        ]
        router = [("router_kernel", (self.inputs, 2), "float32"), ("router_bias", (2,), "float32")]
        return {"dense": dense, "shift": shift, "moe": router + dense + shift}[self.kind]


@dataclass(frozen=True)
class Mlp:
    """What an MLP computes. Channels and hidden channels are multiples of 16.

    Attributes:
      fc1: the layer that expands.
      fc2: the layer that contracts.
      epsilon: of the LayerNorm.
      tokens: of an image.
      grid: height and width of the grid of tokens, for a depthwise convolution of 3 x 3; None for none.
      relu: whether a ReLU comes right after the first layer.
    """

    fc1: Linear
    fc2: Linear
    epsilon: float
    tokens: int
    grid: tuple[int, int] | None = None
    relu: bool = False

    def arguments(self) -> list[tuple[str, tuple[int, ...], str]]:
        """Name, shape and dtype of each parameter, in the order in which the kernel takes them."""
        channels, hidden = self.fc1.inputs, self.fc1.outputs
        norm = [("norm_scale", (channels,), "float32"), ("norm_bias", (channels,), "float32")]
        conv = [("conv_kernel", (9, hidden), "float32"), ("conv_bias", (hidden,), "float32")]
        fc1, fc2 = (
            [(f"{name}_{argument}", shape, dtype) for argument, shape, dtype in linear.arguments()]
            for name, linear in (("fc1", self.fc1), ("fc2", self.fc2))
        )
        return norm + fc1 + (conv if self.grid else []) + fc2


@dataclass(frozen=True)
class HammingLinear:
    """What linear attention in Hamming space computes. Channels are a multiple of 16, head_dim of 8.

    Attributes:
      qkv: the layer that makes queries, keys and values.
      proj: the layer after the attention.
      heads: attention heads.
      tokens: of an image.
      sample_threshold: whether codes are 1 above an image's and head's mean; otherwise above 0.
      epsilon: of the LayerNorm.
    """

    qkv: Linear
    proj: Linear
    heads: int
    tokens: int
    sample_threshold: bool
    epsilon: float

    @property
    def channels(self) -> int:
        """Channels of a token."""
        return self.proj.outputs

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.channels // self.heads

    def arguments(self) -> list[tuple[str, tuple[int, ...], str]]:
        """Name, shape and dtype of each parameter, in the order in which the kernel takes them."""
        norm = [("norm_scale", (self.channels,), "float32"), ("norm_bias", (self.channels,), "float32")]
        qkv, proj = (
            [(f"{name}_{argument}", shape, dtype) for argument, shape, dtype in linear.arguments()]
            for name, linear in (("qkv", self.qkv), ("proj", self.proj))
        )
        return [*norm, *qkv, ("value_kernel", (VALUE_TAPS, self.heads), "float32"), *proj]

    def scratch(self, target: Target, threads: int) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape, without the batch axis, of what goes from pass to pass, all float32."""
        tiles, _ = image_tiles(target, self, threads)
        return [
            ("qkv", (self.tokens, 3 * self.channels)),
            ("sums", (tiles, 2 * self.heads)),
            ("contexts", (threads, self.heads * self.head_dim**2)),
        ]


def image_tiles(target: Target, attention: HammingLinear, threads: int) -> tuple[int, int]:
    """Into how many tiles each image's tokens are cut, and how many tokens a tile has."""
    multiple = target.float_tile[0]
    limit = max(multiple, min(512, CACHE_BYTES // attention.qkv.row_bytes))
    count = -(-(-(-attention.tokens // limit)) // threads) * threads
    size = -(-(-(-attention.tokens // count)) // multiple) * multiple
    return count, size
