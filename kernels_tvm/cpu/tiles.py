"""Sizes of tiles: rows of a tile, images of a pass, rows that are reduced together."""

from kernels_tvm.descriptions import HammingLinearDescription, round_up

CACHE_BYTES = 128 * 1024  # of a tile of rows, in a thread's cache
BETWEEN_BYTES = 4 * 1024 * 1024  # between two passes over the tokens, in the caches of all threads
TILE_ROWS = 512  # at most; larger tiles reuse the weights no better, and threads share them less evenly
TOGETHER = 8  # rows, at most, whose sums are folded into one vector


def rows_at_once(row_bytes: int) -> int:
    """The rows that a tile has at most."""
    return max(1, min(TILE_ROWS, CACHE_BYTES // row_bytes))


def images_at_once(values: int) -> int:
    """The number of images in a pass, if each leaves ``values`` float32 numbers for the next pass."""
    return max(1, BETWEEN_BYTES // (4 * values))


def rows_together(rows: int) -> int:
    """How many neighbours among ``rows`` are reduced together (`emit.fold_rows`): a divisor of ``rows``."""
    return max(size for size in range(1, TOGETHER + 1) if rows % size == 0)


def image_tiles(attention: HammingLinearDescription, threads: int) -> tuple[int, int]:
    """The number of tiles of an image's tokens, and of tokens in a tile: a multiple of `rows_together`."""
    limit, group = rows_at_once(attention.qkv.row_bytes), rows_together(attention.tokens)
    count = round_up(-(-attention.tokens // limit), threads)
    return count, round_up(-(-attention.tokens // count), group)
