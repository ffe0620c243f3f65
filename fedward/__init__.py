"""Fedward: federated, differentially private training across hospitals."""

__version__ = "0.1.0"
