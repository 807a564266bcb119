"""Work on one model in several processes, each of which loads the model for itself.

XLA compiles a program on one core, and measuring many schemes compiles many programs.
"""

import concurrent.futures.process
import multiprocessing
from collections.abc import Callable, Mapping
from typing import Any

import jax
import tqdm

from nqkv_jax.evaluation.protocol import LanguageModel

_lm: LanguageModel | None = None  # of a worker


def run(
    load: Callable[[], LanguageModel],
    tasks: Mapping[str, Callable[[LanguageModel], Any]],
    *,
    workers: int,
    progress: bool | None = None,
) -> None:
    """Calls every task with a model. What they find out they leave in files: nothing comes back.

    Args:
      load: makes the model, once in every process; picklable, like the tasks.
      tasks: by what the bar shows of them; begun in this order.
      workers: processes.
      progress: a bar on stderr; None: if that is a terminal.

    Raises:
      ChildProcessError: a process has died.
      Exception: the first error of a task. Those that have not begun are dropped.
    """
    # A fork of a process that has used XLA has XLA's locks, but not the threads that hold them.
    context = multiprocessing.get_context("spawn")
    bar = tqdm.tqdm(
        total=len(tasks), unit="task", disable=None if progress is None else not progress
    )
    with bar, concurrent.futures.ProcessPoolExecutor(workers, context, _begin, (load,)) as pool:
        futures = {pool.submit(_call, task): label for label, task in tasks.items()}
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
                bar.set_description(futures[future])
                bar.update()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise ChildProcessError(
                f"one of {workers} worker processes has died, perhaps for want of memory. What was "
                "finished is kept; run it again, with fewer workers"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _begin(load: Callable[[], LanguageModel]) -> None:
    global _lm
    _lm = load()


def _call(task: Callable[[LanguageModel], Any]) -> None:
    task(_lm)
    # The programs of a task are not those of the next, and would stay in memory.
    jax.clear_caches()
