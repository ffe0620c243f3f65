"""Asks a registry for newer releases, in a thread of its own: no swap waits for a silent one."""

import threading
from collections.abc import Callable

NOT_YET = "the registry has not answered yet"


class Follower:
    """Asks again and again, from `start` until `stop`.

    Args:
        ask: Brings what is newer into the store; gives why the registry's word is stale, or None.
            May take as long as the registry does.
        said: Is told what `ask` gave, from the thread; first of all that nothing came yet.
        every: Seconds between two times.
    """

    def __init__(
        self,
        ask: Callable[[], str | None],
        said: Callable[[str | None], None],
        *,
        every: float,
    ) -> None:
        self._ask, self._said, self._every = ask, said, every
        self._asked, self._stopping = threading.Event(), threading.Event()
        # A daemon: the adapter stops while a registry is silent, too.
        self._thread = threading.Thread(target=self._run, name="registry", daemon=True)

    def start(self, *, patience: float | None) -> None:
        """Begin, and wait for the first answer: so many seconds at most, or, with None, for it."""
        self._said(NOT_YET)
        self._thread.start()
        self._asked.wait(patience)

    def stop(self) -> None:
        """Ask no more; what is under way is left to itself."""
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                stale = self._ask()
            except Exception as error:  # noqa: BLE001 (a thread that ended would leave us dark)
                stale = f"the registry cannot be followed ({type(error).__name__}: {error})"
            self._said(stale)
            self._asked.set()
            self._stopping.wait(self._every)
