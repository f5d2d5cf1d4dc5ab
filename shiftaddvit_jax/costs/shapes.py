"""The shapes at which kernels are timed and bounded: those of layers of PVTv2, for an image of 224 x 224.

The first stage strides by 4 pixels and each later one by 2 tokens, so their grids have sides of 56, 28, 14
and 7, which are 3136, 784, 196 and 49 tokens. Channels, heads and the widths of MLPs are the variants' own,
see `shiftaddvit_jax.models.pvt_v2`.
"""

# Tokens, inputs, outputs: fc1 and fc2 of stages 1 and 2 of PVTv2-B1.
# ShiftAddViT's Figure 4 times MatShift there.
PAPER_LAYERS = ((3136, 64, 512), (3136, 512, 64), (784, 128, 1024), (784, 1024, 128))

# The same of PVTv2-B0: fc1 and fc2 of stages 1 and 2, and fc1 of stages 3 and 4.
LAYERS = (
    (3136, 32, 256),
    (3136, 256, 32),
    (784, 64, 512),
    (784, 512, 64),
    (196, 160, 640),
    (49, 256, 1024),
)

# Tokens, heads, head_dim: the attentions of stages 1 to 3 of PVTv2-B0.
ATTENTIONS = ((3136, 1, 32), (784, 2, 32), (196, 5, 32))

# Tokens, head_dim, codes, heads: the context k^T v of the same attentions, with EcoFormer's 16 codes a key.
# ShiftAddViT's Figure 5 times MatAdd there.
PAPER_CONTEXTS = tuple((tokens, head_dim, 16, heads) for tokens, heads, head_dim in ATTENTIONS)

# Side of the grid, channels: the depthwise convolutions in the MLPs of stages 1 to 4 of PVTv2-B0.
DEPTHWISE = ((56, 256), (28, 512), (14, 640), (7, 1024))
