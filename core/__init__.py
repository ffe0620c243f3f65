"""Configuration, errors, records, atomic files, identities and the run directory.

The lowest layer: it knows nothing of privacy, learning or federation.
"""
