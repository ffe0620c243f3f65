"""Whole runs on one machine: grids, partitions, scenarios and the loopback deployment."""
