"""A quicker start and end of a process that simulates.

Nearly all of a small study's process is imports, a million objects of them, half of them torch's.
What each of these takes off it (16 sites, 10 rounds, 3 s on two shared cores):

- nothing is looked through for garbage, of which imports make none, and
- of torch only what is used is loaded (`deferred`): together 14%;
- torch's library is loaded beside other imports, by a second core: 7%;
- at the end nothing is taken apart that the system takes back as a whole: 5%.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

# All that `_import_beside_the_library` comes to. One that is missing here costs time, no more.
_EXTENSIONS = (
    *("_asyncio", "_bisect", "_blake2", "_bz2", "_csv", "_ctypes", "_datetime", "_decimal"),
    *("_hashlib", "_heapq", "_json", "_lzma", "_posixsubprocess", "_queue", "_random", "_sha512"),
    *("_sqlite3", "_ssl", "_uuid", "_zoneinfo", "array", "binascii", "fcntl", "mmap", "select"),
    *("unicodedata", "zlib", "numpy.random", "pydantic.types", "_cffi_backend"),
    *("cryptography.hazmat.bindings._rust", "google._upb._message", "grpc._cython.cygrpc"),
)

_OBJECTS_BEFORE_A_LOOK = 50_000, 20, 50


def collect_rarely() -> None:
    """Look for garbage not so often: imports and rounds make many objects and next to none."""
    gc.set_threshold(*_OBJECTS_BEFORE_A_LOOK)


def start() -> None:
    """Import what every simulation needs.

    For a process that ends with the command: it changes torch for all who share the process.
    """
    collect_rarely()
    if "torch" in sys.modules:
        return
    from fedward.simulations.deferred import import_torch

    gc.disable()
    try:
        _import_beside_the_library()
        import_torch()
        importlib.import_module("fedward.simulations.simulate")
    finally:
        gc.freeze()  # what was imported stays
        gc.enable()


def _import_beside_the_library() -> None:
    """Load torch's library, which takes .3 s, while Python imports what needs no library.

    The loader lets in one at a time, so an import of an extension would wait for it: they are
    first. The library has no Python in it, and so never waits for the interpreter.
    """
    for name in _EXTENSIONS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    library = threading.Thread(target=_load_library)
    library.start()
    for name in ("core.run", "privacy.ledger", "server.channel"):
        importlib.import_module(f"fedward.{name}")
    library.join()


def _load_library() -> None:
    """As `import torch` will, which finds it there, or says why it cannot be loaded."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return
    folder = Path(spec.origin).parent / "lib"
    try:
        load = ctypes.CDLL(None).dlopen  # unlike an import it lets other threads run
    except (AttributeError, OSError, TypeError):
        return  # another kind of system
    load.restype = ctypes.c_void_p
    if load(bytes(folder / "libtorch_global_deps.so"), os.RTLD_LAZY | os.RTLD_GLOBAL):
        load(bytes(folder / "libtorch_cpu.so"), os.RTLD_LAZY)


def run(main: Callable[[], None]) -> None:
    """Run `main` as the last act of this process, which ends as soon as all is written.

    Threads are waited for and what is registered from now on to be done at the end is done, as
    ever; then the process is left with its status, without taking its objects apart one by one.
    """
    status: list[int] = []
    atexit.register(_leave, status)  # the first is called last
    try:
        main()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            status.append(end.code or 0)
        raise
    status.append(0)


def _leave(status: list[int]) -> None:
    if status:  # or Python has something to say yet
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status[0])
