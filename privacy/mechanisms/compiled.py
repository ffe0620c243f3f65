"""Machine code for the few loops in which a call of NumPy for each operation is what they cost."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def compiled(
    signature: str,
) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """Compile a function, by numba, at its first call.

    numba is imported no sooner, and nothing is kept on disk: its cache would be unpickled. A call
    leaves Python's lock free, and checks no index.

    Args:
        signature: Types of result and arguments, as numba writes them; there are no others.

    Returns:
        A decorator. The function itself stays within reach as `__wrapped__`.
    """

    def decorate(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        @functools.cache
        def machine_code() -> Callable[_Arguments, _Result]:
            import numba

            code: Callable[_Arguments, _Result] = numba.njit(
                signature, nogil=True, error_model="numpy"
            )(function)
            return code

        @functools.wraps(function)
        def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
            return machine_code()(*args, **kwargs)

        return call

    return decorate
