"""Processes of their own for what may be killed, crash, or hold memory."""

import multiprocessing
from multiprocessing.context import ForkServerContext, SpawnContext


def fresh_processes(*modules: str) -> ForkServerContext | SpawnContext:
    """Processes that share nothing with this one: CUDA and threads do not survive a fork of it. Where the system can
    fork, a server forks them that has done nothing but import ``modules``, so that only the first waits for that.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    return context
