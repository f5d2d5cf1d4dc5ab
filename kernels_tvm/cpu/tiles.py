"""How much of the work is done at once: rows of a tile, images of a pass, rows that are reduced together."""

from kernels_tvm.descriptions import HammingLinearDescription, round_up

CACHE_BYTES = 128 * 1024  # a tile of rows that a thread works on at once
BETWEEN_BYTES = 4 * 1024 * 1024  # from one pass over the tokens to the next: what caches of all threads hold
TILE_ROWS = 512  # at most: more share the weights no better, and threads less evenly
TOGETHER = 8  # rows at most whose sums are folded into one vector


def rows_at_once(row_bytes: int) -> int:
    """How many rows a tile has at most."""
    return max(1, min(TILE_ROWS, CACHE_BYTES // row_bytes))


def images_at_once(values: int) -> int:
    """How many images go from pass to pass together, with so many float32 values of each in between."""
    return max(1, BETWEEN_BYTES // (4 * values))


def rows_together(rows: int) -> int:
    """How many neighbours among ``rows`` are reduced together, see `emit.fold_rows`: a divisor of them."""
    return max(size for size in range(1, TOGETHER + 1) if rows % size == 0)


def image_tiles(attention: HammingLinearDescription, threads: int) -> tuple[int, int]:
    """Into how many tiles each image's tokens are cut, and how many tokens a tile has: whole groups."""
    limit, group = rows_at_once(attention.qkv.row_bytes), rows_together(attention.tokens)
    count = round_up(-(-attention.tokens // limit), threads)
    return count, round_up(-(-attention.tokens // count), group)
