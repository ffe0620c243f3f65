"""Accounting: DpEvents in, epsilon out."""
