"""Work in several threads at the same time."""

import threading
from collections.abc import Callable, Iterable


def together(works: Iterable[Callable[[], object]], within_s: float = 30) -> None:
    """Do each work in a thread of its own; all have to end within that time."""
    threads = [threading.Thread(target=work, daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(within_s)
        assert not thread.is_alive()
