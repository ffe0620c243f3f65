"""Keys of simulated streams, many at a time.

`numpy.random.SeedSequence` makes a key out of a seed in some ten microseconds, which is much where
a thousand sites draw a few numbers each. Its algorithm (O'Neill's seed_seq of 2015, as in NumPy's
bit_generator.pyx) is arithmetic on 32-bit words whose constants do not depend on the seed, so it is
done here for all seeds in the same operations. The keys are NumPy's, to the bit.
"""

import hashlib
import json
from collections.abc import Sequence
from json.encoder import encode_basestring_ascii as quoted

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
    words = np.ascontiguousarray(words.reshape(-1, _SEED_WORDS)[:, ::-1].T)
    keys = _generate(_mix(words)).view(np.uint64)
    for number in np.flatnonzero(words[-1] == 0):  # a number with a word less is mixed less
        keys[number] = _key_of(digests[number])
    return keys


def _digest(seed: Seed) -> bytes:
    return hashlib.sha256(_written(seed).encode()).digest()


def _written(seed: Seed) -> str:
    """The seed as a JSON list; by hand it takes a third of the time."""
    parts = []
    for part in seed:
        if type(part) is str:
            parts.append(quoted(part))
        elif type(part) is int:
            parts.append(str(part))
        else:
            return json.dumps(list(seed))
    return f"[{', '.join(parts)}]"


def _key_of(digest: bytes) -> NDArray[np.uint64]:
    return np.random.SeedSequence(int.from_bytes(digest)).generate_state(_KEY_WORDS).view(np.uint64)


def _constants(start: int, factor: int, number: int) -> tuple[Words, Words]:
    """What is hashed with what: of each hash a word that goes in before and one after."""
    values = [start]
    for _ in range(number):
        values.append(values[-1] * factor & 0xFFFFFFFF)
    words = np.array(values, np.uint32)[:, None]
    return words[:-1], words[1:]


def _mix_constants() -> list[tuple[Words, Words]]:
    """Of the pool's first hashes, and of each source's; its own word, which stays, has a zero."""
    before, after = _constants(_INIT_A, _MULT_A, _POOL + _POOL * (_POOL - 1) + _POOL * _POOL)
    rows, done = [(before[:_POOL], after[:_POOL])], _POOL
    for source in range(_SEED_WORDS):
        others = [number for number in range(_POOL) if number != source]
        use = slice(done, done + len(others))
        done += len(others)
        padded = np.zeros((2, _POOL, 1), np.uint32)
        padded[0, others], padded[1, others] = before[use], after[use]
        rows.append((padded[0], padded[1]))
    return rows


def _hashed(value: Words, before: Words, after: Words) -> Words:
    scaled: Words = (value ^ before) * after
    return scaled ^ (scaled >> _SHIFT)


def _mix(words: Words) -> Words:
    """The pool, shape `(4, seeds)`, of words `(8, seeds)`; what one goes into is done at once."""
    pool = _hashed(words[:_POOL], *_MIX_CONSTANTS[0])
    for source, (before, after) in enumerate(_MIX_CONSTANTS[1:]):
        word = pool[source] if source < _POOL else words[source]
        mixed = _MIX_LEFT * pool - _MIX_RIGHT * _hashed(word, before, after)
        mixed ^= mixed >> _SHIFT
        if source < _POOL:
            mixed[source] = word
        pool = mixed
    return pool


def _generate(pool: Words) -> Words:
    """The key as 32-bit words, shape `(seeds, 4)`."""
    return np.ascontiguousarray(_hashed(pool, *_KEY_CONSTANTS).T)


_MIX_CONSTANTS = _mix_constants()
_KEY_CONSTANTS = _constants(_INIT_B, _MULT_B, _KEY_WORDS)
