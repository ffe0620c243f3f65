"""Shamir's secret sharing over a prime field of 256 bits (Shamir, CACM 1979).

Fewer than `threshold` shares say nothing of the secret. Shares carry no proof of their own: the
coordinator compares them with the dealer's digests.
"""

import hmac
from collections.abc import Sequence
from typing import Final

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

PRIME: Final = 2**256 - 189
"""The largest prime of 256 bits, so that a share is 32 bytes."""

SIZE: Final = 32
_WIDE: Final = 48  # bytes for a coefficient: the remainder's bias is below 2^-127


def split(secret: bytes, *, threshold: int, points: Sequence[int], key: bytes) -> list[bytes]:
    """Share `secret` so that any `threshold` of the shares give it back.

    The polynomial's coefficients are a stream of `key`: the same arguments give the same shares,
    so that asking for them twice reveals nothing more. A key must serve one secret only.

    Args:
        secret: 32 bytes; as a big-endian number it is below `PRIME`.
        threshold: Shares needed, >= 1.
        points: Where the polynomial is evaluated: distinct, >= 1, one for each holder.
        key: 32 secret bytes.

    Returns:
        One share of 32 bytes for each point.

    Raises:
        ValueError: The secret is too large, or the points cannot meet the threshold.
    """
    constant = int.from_bytes(secret, "big")
    if len(secret) != SIZE or constant >= PRIME:
        raise ValueError("the secret must be 32 bytes, below 2^256 - 189")
    if not 1 <= threshold <= len(points) or len(set(points)) != len(points) or min(points) < 1:
        raise ValueError("threshold must be 1 to the number of points, all distinct and positive")
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    wide = stream.update(bytes(_WIDE * (threshold - 1)))
    coefficients = [
        int.from_bytes(wide[at : at + _WIDE], "big") % PRIME for at in range(0, len(wide), _WIDE)
    ]
    shares = []
    for point in points:
        value = 0
        for coefficient in coefficients:
            value = (value * point + coefficient) % PRIME
        shares.append(((value * point + constant) % PRIME).to_bytes(SIZE, "big"))
    return shares


def weights(points: Sequence[int]) -> list[int]:
    """Lagrange's weights that evaluate at 0 a polynomial known at `points`.

    Raises:
        ValueError: The points are not distinct and positive.
    """
    if len(set(points)) != len(points) or not points or min(points) < 1:
        raise ValueError("points must be distinct and positive")
    result = []
    for point in points:
        over = under = 1
        for other in points:
            if other != point:
                over = over * other % PRIME
                under = under * (other - point) % PRIME
        result.append(over * pow(under, -1, PRIME) % PRIME)
    return result


def combine(shares: Sequence[bytes], lagrange: Sequence[int]) -> bytes:
    """The secret from `threshold` shares and the weights of their points, in the same order.

    Raises:
        ValueError: Numbers differ, or a share is not 32 bytes.
    """
    if len(shares) != len(lagrange) or any(len(share) != SIZE for share in shares):
        raise ValueError("one share of 32 bytes for each weight")
    total = sum(
        int.from_bytes(share, "big") * weight
        for share, weight in zip(shares, lagrange, strict=True)
    )
    return (total % PRIME).to_bytes(SIZE, "big")


def same(left: bytes, right: bytes) -> bool:
    """Compare secrets in constant time."""
    return hmac.compare_digest(left, right)
