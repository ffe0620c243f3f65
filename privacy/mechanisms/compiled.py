"""Machine code for the few loops in which a call of NumPy for each operation is what they cost."""

import functools
import types
from collections.abc import Callable
from typing import Any, Final, ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_Function = TypeVar("_Function", bound=Callable[..., Any])
_CODE: Final = "machine_code"
_ANY_ORDER = {"reassoc", "contract"}  # what is not finite stays so


def compiled(
    signature: str, *, any_order: bool = False
) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """Compile a function, by numba, at its first call.

    numba is imported no sooner, and nothing is kept on disk: its cache would be unpickled. A call
    leaves Python's lock free, and checks no index. A compiled function may call others.

    Args:
        signature: Types of result and arguments, as numba writes them; there are no others.
        any_order: Whether terms may be added up in any order, so several at once.

    Returns:
        A decorator. The function itself stays within reach as `__wrapped__`.
    """

    def decorate(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        @functools.cache
        def machine_code() -> Callable[_Arguments, _Result]:
            import numba

            code: Callable[_Arguments, _Result] = numba.njit(
                signature, nogil=True, error_model="numpy", fastmath=any_order and _ANY_ORDER
            )(_linked(function))
            return code

        @functools.wraps(function)
        def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
            return machine_code()(*args, **kwargs)

        vars(call)[_CODE] = machine_code
        return call

    return decorate


def intrinsic(make: Callable[[], Any]) -> Callable[[_Function], _Function]:
    """In compiled code, what `make` makes stands for the function; in Python it is called itself.

    Args:
        make: Makes what numba calls an intrinsic; called once, and only if something is compiled.
    """

    def decorate(function: _Function) -> _Function:
        vars(function)[_CODE] = functools.cache(make)
        return function

    return decorate


def _linked(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """The function, with machine code in the place of others that it calls."""
    known = function.__globals__
    names = [
        n for n in function.__code__.co_names if _CODE in getattr(known.get(n), "__dict__", ())
    ]
    if not names:
        return function
    others = {name: vars(known[name])[_CODE]() for name in names}
    return types.FunctionType(function.__code__, {**known, **others}, function.__name__)
