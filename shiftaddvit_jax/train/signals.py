"""Signals that ask a run to stop, which it does after the step under way."""

import os
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager

import jax

Asked = Callable[[int], signal.Signals | None]


@contextmanager
def stop_signals() -> Generator[Asked]:
    """A function of a step's number: SIGTERM or SIGINT if one asks to stop after that step, else None.

    While the block runs, neither ends the process by itself, but for a second Ctrl-C. All processes of a run
    get the same answer at the same step, where one of them got the signal. Outside the main thread, signals
    are left alone.
    """
    arrived: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: None
        return
    several = jax.process_count() > 1

    def interrupt(number, frame):
        if several:  # SIGTERM is what JAX tells the other processes of
            os.kill(os.getpid(), signal.SIGTERM)
        elif arrived:
            signal.default_int_handler(number, frame)
        arrived.append(signal.SIGINT)

    handlers = {signal.SIGINT: interrupt}
    if not several:
        handlers[signal.SIGTERM] = lambda number, frame: arrived.append(signal.SIGTERM)
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield _asked_together if several else lambda step: arrived[0] if arrived else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _asked_together(step):
    from jax.experimental import multihost_utils

    return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None
