"""Keys of simulated streams, many at a time.

`numpy.random.SeedSequence` makes a key out of a seed in some ten microseconds, which is much where
a thousand sites draw a few numbers each. Its algorithm (O'Neill's seed_seq of 2015, as in NumPy's
bit_generator.pyx) is arithmetic on 32-bit words whose constants do not depend on the seed, so it is
done here for all seeds in the same operations. The keys are NumPy's, to the bit.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Seed = Sequence[int | str]
Words = NDArray[np.uint32]

_POOL, _SEED_WORDS, _KEY_WORDS = 4, 8, 4
_SHIFT = np.uint32(16)
_INIT_A, _MULT_A = 0x43B0D7E5, 0x931E8875
_INIT_B, _MULT_B = 0x8B51F9DD, 0x58F38DED
_MIX_LEFT, _MIX_RIGHT = np.uint32(0xCA01F9DD), np.uint32(0x4973F715)


def philox_keys(seeds: Sequence[Seed]) -> NDArray[np.uint64]:
    """Of each seed the key of its stream, shape `(len(seeds), 2)`."""
    digests = [_digest(seed) for seed in seeds]
    if len(digests) <= 1:
        return np.array([_key_of(digest) for digest in digests], np.uint64).reshape(-1, 2)
    # As SeedSequence has it: the digest is one large number, whose lowest word comes first.
    words = np.frombuffer(b"".join(digests), ">u4").astype(np.uint32)
    words = words.reshape(-1, _SEED_WORDS)[:, ::-1]
    keys = _generate(_mix(words)).view(np.uint64)
    for number in np.flatnonzero(words[:, -1] == 0):  # a number with a word less is mixed less
        keys[number] = _key_of(digests[number])
    return keys


def _digest(seed: Seed) -> bytes:
    return hashlib.sha256(json.dumps(list(seed)).encode()).digest()


def _key_of(digest: bytes) -> NDArray[np.uint64]:
    return np.random.SeedSequence(int.from_bytes(digest)).generate_state(_KEY_WORDS).view(np.uint64)


def _constants(start: int, factor: int) -> Iterator[tuple[np.uint32, np.uint32]]:
    while True:
        following = start * factor & 0xFFFFFFFF
        yield np.uint32(start), np.uint32(following)
        start = following


def _mix(words: Words) -> Words:
    """The pool, shape `(seeds, 4)`."""
    constants = _constants(_INIT_A, _MULT_A)

    def hashed(value: Words) -> Words:
        before, after = next(constants)
        scaled: Words = (value ^ before) * after
        return scaled ^ (scaled >> _SHIFT)

    def mixed(x: Words, y: Words) -> Words:
        value: Words = _MIX_LEFT * x - _MIX_RIGHT * y
        return value ^ (value >> _SHIFT)

    pool = [hashed(words[:, number]) for number in range(_POOL)]
    for source in range(_POOL):
        for target in range(_POOL):
            if source != target:
                pool[target] = mixed(pool[target], hashed(pool[source]))
    for source in range(_POOL, _SEED_WORDS):
        for target in range(_POOL):
            pool[target] = mixed(pool[target], hashed(words[:, source]))
    return np.stack(pool, axis=1)


def _generate(pool: Words) -> Words:
    """The key as 32-bit words, shape `(seeds, 4)`."""
    constants = [c for c, _ in zip(_constants(_INIT_B, _MULT_B), range(_KEY_WORDS), strict=False)]
    before = np.array([b for b, _ in constants], np.uint32)
    after = np.array([a for _, a in constants], np.uint32)
    value = (pool ^ before) * after
    return np.ascontiguousarray(value ^ (value >> _SHIFT))
