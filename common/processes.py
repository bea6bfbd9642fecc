"""The processes of one run, as `accelerate launch` starts them, and their memory. Alone, what is about several does
nothing.

Each process takes its share of the rows. Gradients are averaged once an optimiser step, so that every process holds
the same weights; the main process alone writes and prints.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """Of this process on its machine: the number of its CUDA device."""
    return int(os.environ.get("LOCAL_RANK", 0))


def cores() -> int:
    """This process's share of the machine's cores."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def busy_cores(seconds: float = 0.25) -> float:
    """How many cores other processes keep busy, measured that long; 0.0 where the system does not tell."""
    began = _busy_seconds()
    if began is None:
        return 0.0
    time.sleep(seconds)
    own, others = (after - before for after, before in zip(_busy_seconds(), began))
    return max(0.0, others - own) / seconds


def _busy_seconds() -> tuple[float, float] | None:
    """Of this process, and of all cores together, since they began."""
    try:
        user, nice, system = Path("/proc/stat").read_text().split()[1:4]
    except (OSError, ValueError):
        return None
    return time.process_time(), (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


def leave_busy_cores() -> None:
    """Has torch compute with one thread for each core that others leave free, unless OMP_NUM_THREADS says how many.

    Threads that wait for each other spin: where one of them has lost its core to another process, the others spin while
    it is not even running, and a training step takes several times as long as with fewer threads.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    threads = torch.get_num_threads()
    free = round((os.cpu_count() or 1) - busy_cores())
    if free < threads:
        torch.set_num_threads(max(1, free))
        say(f"other processes keep {threads - free} of {threads} cores busy: computing with {torch.get_num_threads()}")


def is_main() -> bool:
    return rank() == 0


def join(device: torch.device) -> torch.device:
    """Meets the other processes → this one's own device. gloo on the CPU, NCCL on CUDA."""
    if world_size() == 1:
        return device
    state = PartialState(cpu=device.type == "cpu")
    return state.device if device.type != "cpu" else device


def keep_freed_memory() -> None:
    """Has the C library keep up to 1 GiB of memory that was freed, in pieces of up to 32 MiB, its limit. Given back to
    the system, as glibc does by itself, each page of them costs a fault when a like piece is wanted again: a fifth of
    the time of a rendered frame."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt:
            mallopt(M_MMAP_THRESHOLD, 32 << 20)
            mallopt(M_TRIM_THRESHOLD, 1 << 30)


@contextmanager
def worker_pool(workers: int, initializer: Callable[[], None]) -> Iterator[ProcessPoolExecutor]:
    """Spawned processes that never outlive this one, however it ends, and are ended at once when an error or a signal
    leaves the block. Ctrl-C and SIGTERM to the whole group of processes are this one's to answer."""
    context = multiprocessing.get_context("spawn")
    earlier = set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, context, _start_worker, (initializer,)) as pool:
        try:
            with _signals_held_back():
                for _ in range(workers):
                    pool.submit(int)
            yield pool
        except BaseException:
            for process in set(multiprocessing.active_children()) - earlier:
                process.kill()
            raise


@contextmanager
def _signals_held_back():
    """Ctrl-C and SIGTERM wait for the end of the block; processes that are started in it never see them."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    noted = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    # The mask is for the new processes. It does not keep another thread of this one from taking a signal.
    handlers = [signal.signal(number, lambda number, frame: noted.append(number)) for number in numbers]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in zip(numbers, handlers):
            signal.signal(number, handler)
    for number in noted:
        signal.raise_signal(number)


def _start_worker(initializer: Callable[[], None]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    initializer()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def say(text: str) -> None:
    if is_main():
        print(text, flush=True)


def wait() -> None:
    """Until all processes are here."""
    if world_size() > 1:
        dist.barrier()


def mean_over_processes(tensors: list[torch.Tensor]) -> None:
    """Replaces each tensor by its mean over all processes, in one message for each dtype."""
    if world_size() == 1:
        return
    for dtype in {tensor.dtype for tensor in tensors}:
        group = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.flatten() for tensor in group])
        dist.all_reduce(flat)
        means = (flat / world_size()).split([tensor.numel() for tensor in group])
        for tensor, mean in zip(group, means):
            tensor.copy_(mean.view_as(tensor))


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process."""
    if world_size() == 1:
        return flag
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags)
    return flags.item() > 0


def copy_from_main(tensors: list[torch.Tensor]) -> None:
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)
