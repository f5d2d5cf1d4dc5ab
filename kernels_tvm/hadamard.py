"""Hadamard matrices: which sizes have one here, and the matrices that are not made of powers of two."""

import numpy as np

# A matrix of order 2 (q + 1) for each of these q = p or p^2, see `conference_matrix`; p by q.
_FIELDS = {5: 5, 9: 3, 13: 13}
ORDERS = tuple(2 * (q + 1) for q in _FIELDS)  # 12, 20 and 28


def orders(size: int) -> tuple[int, ...]:
    """The orders, 1 or of `ORDERS`, of which ``size`` is a power-of-two multiple: one, or none."""
    quotients = {order: divmod(size, order) for order in (1, *ORDERS)}
    return tuple(
        order for order, (rest, remainder) in quotients.items() if not remainder and rest.bit_count() == 1
    )


def conference_matrix(order: int) -> np.ndarray:
    """The symmetric matrix C of Paley's second construction: int8 codes [order / 2, order / 2].

    Codes are 1 and -1, and 0 on the diagonal.
    With its size q + 1, C C = q I, and the Hadamard matrix of the order is [[C + I, C - I], [C - I, -C - I]].
    Between the elements of the field of q numbers, a code is 1 where their difference is a square, else -1;
    a row and a column of ones come first. The field is that of numbers a + b i modulo the prime p, where b is
    0 unless q = p^2. Source: R. Paley, On orthogonal matrices, 1933.
    """
    q = order // 2 - 1
    p = _FIELDS[q]
    numbers = [(a, b) for a in range(p) for b in range(q // p)]
    squares = {((a * a - b * b) % p, 2 * a * b % p) for a, b in numbers}
    codes = np.ones((q + 1, q + 1), np.int8)
    for row, (a, b) in enumerate(numbers, 1):
        for column, (c, d) in enumerate(numbers, 1):
            codes[row, column] = 1 if ((a - c) % p, (b - d) % p) in squares else -1
    np.fill_diagonal(codes, 0)
    return codes
