"""Work of the host on several threads, its results in order."""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
  function: Callable[[Item], Result], items: Iterable[Item], count: int = 0
) -> Iterator[Result]:
  """Yields `function(item)` for each item, a few of them being worked on ahead.

  It pays where most of the work runs without Python's lock, as decoding and hashing do. An error
  of `function` is raised in the item's place, and what has not begun by then never does. `count` is
  that of the threads, and so of the items ahead; 0 takes one a processor.
  """
  count = count or len(os.sched_getaffinity(0))
  queue: collections.deque[futures.Future] = collections.deque()
  with futures.ThreadPoolExecutor(count) as pool:
    try:
      for item in items:
        queue.append(pool.submit(function, item))
        if len(queue) > count:
          yield queue.popleft().result()
      while queue:
        yield queue.popleft().result()
    finally:
      for future in queue:
        future.cancel()
