"""Mechanisms: clipping and noise, drawn from a cryptographic stream."""
