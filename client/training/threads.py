"""NumPy's matrix products on as many threads as torch's.

NumPy's library of linear algebra starts a thread for each processor, and lets those wait busily.
Whoever told torch how many threads to use means all that trains.
"""

import functools
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController


def follow_torch() -> None:
    """Set the threads of NumPy's matrix products, in the whole process, to those of torch."""
    _set(torch.get_num_threads())


@functools.lru_cache(maxsize=1)  # nothing to do where it is the number of the last call
def _set(threads: int) -> None:
    _libraries().limit(limits=threads)


@functools.cache
def _libraries() -> "ThreadpoolController":
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")
