"""Secure aggregation: state machines that take and return messages, with no I/O."""
