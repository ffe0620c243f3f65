"""Audits: what a trainer and a run really leak."""
