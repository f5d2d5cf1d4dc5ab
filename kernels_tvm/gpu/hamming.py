"""Products of binary codes on GPUs: XOR and popcount of words, or products of tiles on tensor cores."""

from tvm.script.ir_builder import tirx as T

from kernels_tvm.descriptions import HammingProductDescription
from kernels_tvm.emit import Arguments, kernel, when
from kernels_tvm.gpu.emit import all_of, barrier, fill, launch, registers, words_of
from kernels_tvm.gpu.instructions import WARP, different_bits
from kernels_tvm.gpu.products import TENSOR_TILE, THREADS, Tile, tensor_product
from kernels_tvm.gpu.targets import GpuTarget
from kernels_tvm.gpu.tiles import ThreadBlock, padded_tile

POPCOUNT_TILE = Tile(64, 64, 8)
TENSOR_WORDS = 4  # of a code, at least; a tensor core's product of shorter codes would be mostly padding


def hamming_product_kernel(target: GpuTarget, product: HammingProductDescription):
    """From queries [batch, rows, words], keys [batch, words, others] -> y [batch, rows, others], int32.

    A word holds 32 signs of -1 and 1 as bits. The product of two codes is their length less twice the number
    of bits in which they differ.
    """
    words = product.words
    on_tensor_cores = target.bit_mma is not None and words >= TENSOR_WORDS
    tile = TENSOR_TILE if on_tensor_cores else POPCOUNT_TILE

    def body(arguments: Arguments):
        queries = arguments("queries", ("batch", "rows", words), "uint32")
        keys = arguments("keys", ("batch", words, "others"), "uint32")
        y = arguments("y", ("batch", "rows", "others"), "int32")
        batch, rows, others = (arguments.symbols[name] for name in ("batch", "rows", "others"))
        queries, keys = (words_of(part, part.shape) for part in (queries, keys))
        down, across = T.ceildiv(rows, tile.rows), T.ceildiv(others, tile.columns)
        with (
            when(all_of(batch > 0, rows > 0, others > 0)),
            launch(THREADS, batch * down, across) as (x, y_tile, thread),
        ):
            image = T.bind(T.truncdiv(x, down))
            block = ThreadBlock(
                THREADS, thread, T.bind(T.truncmod(x, down) * tile.rows), T.bind(y_tile * tile.columns)
            )

            def query(row, word):
                return queries[image, block.first_row + row, word], block.first_row + row < rows

            def key(column, word):
                return keys[image, word, block.first_column + column], block.first_column + column < others

            def finish(row, column, distances):
                row = T.bind(block.first_row + row)
                for i, distance in enumerate(distances):
                    other = T.bind(block.first_column + column + i)
                    with when(T.And(row < rows, other < others)):
                        value = T.int32(product.length) - T.shift_left(distance, T.int32(1))
                        T.buffer_store(y, value, [image, row, other])

            if on_tensor_cores:

                def load(query_tile, key_tile, first_word):
                    _load(block, tile.rows, tile.depth, words, first_word, query, query_tile)
                    _load(block, tile.columns, tile.depth, words, first_word, key, key_tile)

                tensor_product(target, block, words, load, finish, "bits")
            else:
                _popcount_product(target, block, words, query, key, finish)

    return kernel(body)


def _load(block, codes: int, depth: int, words: int, first_word, read, tile, transposed=False):
    """Fill a tile [codes, depth], or its transpose, with the words ``read(code, word)``; 0 outside."""

    def load(number):
        # Neighbouring threads take neighbouring codes, since keys lie so in memory.
        code, word = T.bind(number % codes), T.bind(number // codes)
        value, inside = read(code, first_word + word)
        part = registers(1, "int32")
        fill(part, T.int32(0), 1)
        with when(T.And(inside, first_word + word < words)):
            T.buffer_store(part, value, [0])
        T.buffer_store(tile, part[0], [word, code] if transposed else [code, word])

    block.each(codes * depth, load)


def _popcount_product(target, block, words: int, query, key, finish):
    tile = POPCOUNT_TILE
    depth = min(words, tile.depth)
    query_tile, key_tile = padded_tile(tile.rows, depth, "int32"), padded_tile(depth, tile.columns, "int32")
    tall, wide = tile.rows * WARP // THREADS, tile.columns // WARP
    row, column = T.bind(block.thread // WARP * tall), T.bind(block.thread % WARP)
    sums = registers(tall * wide, "int32")
    fill(sums, T.int32(0), tall * wide)
    with T.serial(0, -(-words // depth)) as step:
        first_word = T.bind(step * depth)
        _load(block, tile.rows, depth, words, first_word, query, query_tile)
        _load(block, tile.columns, depth, words, first_word, key, key_tile, transposed=True)
        barrier()
        with T.serial(0, depth) as word:
            for i in range(tall):
                for j in range(wide):
                    at = i * wide + j
                    a, b = query_tile[row + i, word], key_tile[word, column + j * WARP]
                    T.buffer_store(sums, different_bits(target, a, b, sums[at]), [at])
        barrier()
    for i in range(tall):
        for j in range(wide):
            finish(row + i, column + j * WARP, [sums[i * wide + j]])
