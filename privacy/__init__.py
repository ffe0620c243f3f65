"""Mechanisms, accounting, ledger, units, secure aggregation and audits. Knows nothing of Flower."""
