"""Partitioners: one data set over many simulated sites."""

from fedward.simulations.partitions.card import data_card, draw_card
from fedward.simulations.partitions.partition import (
    Partition,
    make_partition,
    read_rows,
    write_rows,
)

__all__ = ["Partition", "data_card", "draw_card", "make_partition", "read_rows", "write_rows"]
