"""TVM's runtime without its compiler, which takes seconds to import. Compiled kernels need no compiler."""

import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache, wraps
from importlib import util
from pathlib import Path
from threading import RLock, get_ident

_LOCK = RLock()


def once(function: Callable) -> Callable:
    """``function``, run once for each of its arguments: other threads wait for the result.

    `functools.cache` would run it in each thread that asks before the first one is done. All such functions
    share a lock: they call each other, and load and register what a process has once.
    """
    cached = cache(function)

    @wraps(function)
    def locked(*arguments):
        with _LOCK:
            return cached(*arguments)

    locked.cache_clear = cached.cache_clear  # pyrefly: ignore[missing-attribute]  # functions take any attribute
    return locked


def load_function(path: Path) -> Callable:
    """The function ``main`` of a library that TVM exported.

    Raises:
      Exception: of any kind, if the file is no such library.
    """
    return start().load_module(path)["main"]


LIBRARY = "libtvm_runtime.so"  # what kernels call: threads and workspaces
_provided: list[Path] = []


def provide_runtime(folder: Path) -> None:
    """Have `start` take `LIBRARY` from ``folder`` where TVM is not installed."""
    _provided.append(folder)


def runtime_folder() -> Path | None:
    """Where `LIBRARY` is: in the installed TVM, or else where it was provided; None if nowhere."""
    spec = util.find_spec("tvm")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent / "lib"
    return _provided[0] if _provided else None


@once
def start():
    """The package ``tvm_ffi``, with the part of TVM that kernels call; importing ``tvm`` later adds to it."""
    os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")
    # A waiting thread looks for work this many times before it sleeps: for some 50 microseconds, where TVM's
    # own number is a tenth of a second. Each thread of XLA has its own TVM threads on the same cores, so
    # threads awake after one image would slow those of the next.
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "100")
    with _without_torch():
        import tvm_ffi
    folder = runtime_folder()
    if folder is None:
        raise ModuleNotFoundError("No module named 'tvm'", name="tvm")
    # The arguments are those of `tvm` itself.
    tvm_ffi.libinfo.load_lib_ctypes("tvm", "tvm_runtime", "RTLD_GLOBAL", extra_lib_paths=[folder])
    return tvm_ffi


@contextmanager
def _without_torch() -> Generator[None]:
    """A context in which this thread can't import torch. A torch that is imported already stays."""
    # tvm_ffi imports an installed torch, which takes seconds, for conversions that nothing here needs.
    thread = get_ident()

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "torch" and get_ident() == thread:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Finder)
    try:
        yield
    finally:
        sys.meta_path.remove(Finder)
