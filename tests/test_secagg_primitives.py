import os
import random

import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from hypothesis import given
from hypothesis import strategies as st

from fedward.privacy.secagg import keys, shamir
from fedward.privacy.secagg.masks import CHUNK_BYTES, Mask, apply_masks


def test_shamirs_modulus_is_prime() -> None:
    # Miller and Rabin, 40 random bases: a composite passes with probability below 4^-40.
    odd, twos = shamir.PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for _ in range(40):
        value = pow(random.randrange(2, shamir.PRIME - 1), odd, shamir.PRIME)
        powers = [pow(value, 2**k, shamir.PRIME) for k in range(twos)]
        assert value == 1 or shamir.PRIME - 1 in powers


@given(
    secret=st.integers(0, shamir.PRIME - 1),
    points=st.lists(st.integers(1, 5000), min_size=1, max_size=12, unique=True),
    data=st.data(),
)
def test_any_threshold_of_the_shares_give_the_secret_back(
    secret: int, points: list[int], data: st.DataObject
) -> None:
    threshold = data.draw(st.integers(1, len(points)))
    wanted = secret.to_bytes(32, "big")
    shares = shamir.split(wanted, threshold=threshold, points=points, key=os.urandom(32))
    chosen = data.draw(st.permutations(range(len(points))))[:threshold]

    lagrange = shamir.weights([points[at] for at in chosen])

    assert shamir.combine([shares[at] for at in chosen], lagrange) == wanted


def test_shares_below_the_threshold_fit_every_secret() -> None:
    # Two shares of a threshold of three lie on a parabola through any secret whatever.
    shares = shamir.split(bytes(32), threshold=3, points=[1, 2, 3], key=os.urandom(32))
    lagrange = shamir.weights([1, 2, 3])

    for secret in (0, 1, 2**200):
        known = [int.from_bytes(share, "big") for share in shares[:2]]
        partial = known[0] * lagrange[0] + known[1] * lagrange[1]
        third = (secret - partial) * pow(lagrange[2], -1, shamir.PRIME) % shamir.PRIME
        combined = shamir.combine([*shares[:2], third.to_bytes(32, "big")], lagrange)
        assert int.from_bytes(combined, "big") == secret


def test_the_same_key_gives_the_same_shares_and_another_key_others() -> None:
    secret, key = bytes(31) + b"\x07", os.urandom(32)

    first = shamir.split(secret, threshold=3, points=[1, 2, 3, 4], key=key)

    assert shamir.split(secret, threshold=3, points=[1, 2, 3, 4], key=key) == first
    assert shamir.split(secret, threshold=3, points=[1, 2, 3, 4], key=os.urandom(32)) != first


@pytest.mark.parametrize(
    ("secret", "threshold", "points"),
    [
        (b"\xff" * 32, 2, [1, 2, 3]),
        (bytes(31), 2, [1, 2, 3]),
        (bytes(32), 4, [1, 2, 3]),
        (bytes(32), 0, [1, 2, 3]),
        (bytes(32), 2, [1, 1, 3]),
        (bytes(32), 2, [0, 1, 3]),
    ],
)
def test_what_cannot_be_shared_is_refused(secret: bytes, threshold: int, points: list[int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        shamir.split(secret, threshold=threshold, points=points, key=bytes(32))


@given(root=st.binary(min_size=32, max_size=32), number=st.integers(0, 2**32 - 1))
def test_derivation_is_hkdf_expand(root: bytes, number: int) -> None:
    info = b"fedward secure aggregation 1: mask\0" + number.to_bytes(4, "little")
    info += (3).to_bytes(2, "little") + (9).to_bytes(2, "little")

    derived = keys.derive(root, "mask", number, 3, 9)

    assert derived == HKDFExpand(hashes.SHA256(), 32, info).derive(root)


def test_two_sites_agree_on_a_key_only_under_the_same_list() -> None:
    first, second = os.urandom(32), os.urandom(32)
    publics = keys.public_key(first), keys.public_key(second)

    there = keys.agree(first, publics[1], context=b"a" * 32)
    back = keys.agree(second, publics[0], context=b"a" * 32)
    elsewhere = keys.agree(second, publics[0], context=b"b" * 32)

    assert there == back
    assert elsewhere != back


def test_a_public_key_of_low_order_is_refused() -> None:
    with pytest.raises(ValueError, match=r"."):
        keys.agree(os.urandom(32), bytes(32), context=bytes(32))
    assert not keys.usable(bytes(32))


def test_a_sealed_message_opens_with_its_key_only() -> None:
    key = os.urandom(32)
    sealed = keys.seal(key, b"secret")

    assert keys.unseal(key, sealed) == b"secret"
    assert keys.unseal(os.urandom(32), sealed) is None
    assert keys.unseal(key, sealed[:-1] + bytes([sealed[-1] ^ 1])) is None


@pytest.mark.parametrize("length", [1, 3, 4, 5, CHUNK_BYTES // 4, CHUNK_BYTES // 4 * 9 + 7])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_mask_is_the_ciphers_stream_however_many_threads_make_it(
    length: int, threads: int
) -> None:
    seeds = [os.urandom(32) for _ in range(3)]
    vector = np.arange(length, dtype=np.uint32)

    masked = vector.copy()
    apply_masks(
        masked, [Mask(seeds[0]), Mask(seeds[1], subtract=True), Mask(seeds[2])], threads=threads
    )

    streams = []
    for seed in seeds:
        cipher = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
        streams.append(np.frombuffer(cipher.update(bytes(4 * length)), dtype="<u4"))
    assert np.array_equal(masked, vector + streams[0] - streams[1] + streams[2])


def test_a_mask_never_shows_its_seed() -> None:
    assert "seed" not in repr(Mask(bytes(32)))


@pytest.mark.parametrize(
    "vector",
    [np.zeros(4, np.int32), np.zeros((2, 2), np.uint32), np.zeros(8, np.uint32)[::2]],
)
def test_a_vector_that_cannot_be_masked_in_place_is_refused(vector: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint32"):
        apply_masks(vector, [Mask(bytes(32))])
