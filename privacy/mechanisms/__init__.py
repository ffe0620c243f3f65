"""Mechanisms: clipping and noise, drawn from a cryptographic stream."""

from fedward.privacy.mechanisms.count import release_count
from fedward.privacy.mechanisms.noise import NoiseSource, add_noise
from fedward.privacy.mechanisms.sources import secure_source, simulated_source

__all__ = ["NoiseSource", "add_noise", "release_count", "secure_source", "simulated_source"]
