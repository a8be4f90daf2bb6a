"""The exact sign test: whether answers that changed in two directions may have done so by chance."""

from __future__ import annotations

import math


def sign_test(count: int, others: int) -> float:
    """Return the probability that at least `count` changes go one way if each goes either way equally often.

    Args:
        count: number of changes in the one direction; the test is one-sided.
        others: number of changes in the other direction.
    """
    changed = count + others
    outcomes, term = 0, math.comb(changed, count)
    for number in range(count, changed + 1):
        outcomes += term
        term = term * (changed - number) // (number + 1)  # the next binomial coefficient, without its factorials
    probability: float = outcomes / 2**changed
    return probability
