"""One seed a run, and from it a seed for every purpose."""

import hashlib


def derived_seed(seed: int, *purpose: str | int) -> int:
    """A seed's own seed for a purpose, from 0 to 2⁶³ − 1: derived_seed(0, "rollout", 17).

    By a hash, so that no two purposes, steps or runs ever share random numbers, which seed + step would: that
    of run 1 at step 0 is that of run 0 at step 1.
    """
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
