"""Arrays in, arrays out: the primitives of ShiftAddViT, one file an op.

Binarization, products, convolutions and dispatch take ``implementation``:

- ``None``: the best that runs here, never failing. On CPUs, kernels compute products with packed weights; on
  GPUs, outside training, they compute the other ops too.
- ``"xla"``: the reference, with gradients.
- ``"tvm"``: the kernel, or a clear error where none exists.
- ``"tvm_shift"``: as ``"tvm"``, but MatShift's kernels use shifts and additions alone.
"""

from shiftaddvit_jax.ops.activations import dynamic_int8, fixed_point, quantize_activations
from shiftaddvit_jax.ops.binarize import binarize, pack_codes
from shiftaddvit_jax.ops.depthwise_conv import depthwise_conv_1d, depthwise_conv_2d, depthwise_conv_gelu
from shiftaddvit_jax.ops.dispatch import dispatch
from shiftaddvit_jax.ops.grid_sample import grid_sample
from shiftaddvit_jax.ops.hadamard import hadamard, rotate
from shiftaddvit_jax.ops.hamming import code_similarity, hamming_product
from shiftaddvit_jax.ops.hashing import KernelHash, hash_codes, learn_hash
from shiftaddvit_jax.ops.matadd import matadd
from shiftaddvit_jax.ops.matshift import matshift, packed_product, shift_product
from shiftaddvit_jax.ops.normalize import l2_normalize
from shiftaddvit_jax.ops.packing import PackedWeight, pack_weight, unpack_weight
from shiftaddvit_jax.ops.perturb import (
    add_noise,
    adjust_brightness,
    adjust_contrast,
    gaussian_blur,
    rotate_hue,
    warp,
)
from shiftaddvit_jax.ops.power_of_two import (
    additive_power_of_two,
    additive_power_of_two_codes,
    additive_power_of_two_levels,
    power_of_two,
    power_of_two_codes,
    power_of_two_weight,
    shift_weight,
    two_power_numbers,
    two_powers_of_two,
)

__all__ = [
    "KernelHash",
    "PackedWeight",
    "add_noise",
    "additive_power_of_two",
    "additive_power_of_two_codes",
    "additive_power_of_two_levels",
    "adjust_brightness",
    "adjust_contrast",
    "binarize",
    "code_similarity",
    "depthwise_conv_1d",
    "depthwise_conv_2d",
    "depthwise_conv_gelu",
    "dispatch",
    "dynamic_int8",
    "fixed_point",
    "gaussian_blur",
    "grid_sample",
    "hadamard",
    "hamming_product",
    "hash_codes",
    "l2_normalize",
    "learn_hash",
    "matadd",
    "matshift",
    "pack_codes",
    "pack_weight",
    "packed_product",
    "power_of_two",
    "power_of_two_codes",
    "power_of_two_weight",
    "quantize_activations",
    "rotate",
    "rotate_hue",
    "shift_product",
    "shift_weight",
    "two_power_numbers",
    "two_powers_of_two",
    "unpack_weight",
    "warp",
]
