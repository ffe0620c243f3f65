import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedward.core.errors import ConfigError, SignatureInvalid
from fedward.core.identity import Identity, PublicIdentity

SITE, PUBLISHER = Identity.generate_site(), Identity.generate_publisher()


@pytest.mark.parametrize("identity", [SITE, PUBLISHER], ids=["Ed25519", "P-256"])
def test_a_saved_identity_signs_what_its_public_half_verifies(
    identity: Identity, tmp_path: Path
) -> None:
    identity.save(tmp_path / "key.pem")

    again = Identity.load(tmp_path / "key.pem")
    public = PublicIdentity.from_pem((tmp_path / "key.pem.pub").read_bytes())

    public.verify(again.sign(b"message"), b"message")
    assert public.fingerprint == identity.public.fingerprint


@given(message=st.binary(max_size=64), flipped=st.integers(min_value=0, max_value=511))
def test_a_flipped_bit_in_a_signature_does_not_verify(message: bytes, flipped: int) -> None:
    signature = bytearray(SITE.sign(message))
    signature[flipped // 8] ^= 1 << flipped % 8

    with pytest.raises(SignatureInvalid):
        SITE.public.verify(bytes(signature), message)


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    SITE.save(tmp_path / "key.pem")
    os.chmod(tmp_path / "key.pem", 0o644)

    with pytest.raises(ConfigError, match="chmod 600"):
        Identity.load(tmp_path / "key.pem")


@given(st.binary(max_size=300))
def test_nothing_but_a_public_key_is_one(data: bytes) -> None:
    with pytest.raises(SignatureInvalid):
        PublicIdentity.from_pem(data)


def test_a_private_key_is_not_printed() -> None:
    assert "PRIVATE" not in repr(SITE)
    assert len(repr(SITE)) < 40
