"""What a reader of somebody's file may take."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def bounded_memory(allowance: int) -> Iterator[None]:
    """Inside, this process may take so many bytes of address space beyond what it has: more is a MemoryError."""
    import resource  # Windows has none

    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    before = resource.getrlimit(resource.RLIMIT_AS)
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + allowance, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
