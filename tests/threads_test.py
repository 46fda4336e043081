"""threads: results in order, an error in its place, and nothing begun after it."""

import threading

import pytest

from rndpo_jax.runtime import threads


def test_results_come_in_order_and_items_are_taken_as_needed():
  taken = []

  def items():
    for item in range(1000):
      taken.append(item)
      yield item

  later = threading.Event()

  def double(item):
    if item == 0:
      assert later.wait(10)  # until another thread is further
    later.set()
    return 2 * item

  results = threads.in_order(double, items(), count=2)  # also on a machine of one processor
  assert [next(results) for _ in range(3)] == [0, 2, 4]
  assert len(taken) < 1000
  assert list(results) == list(range(6, 2000, 2))
  assert list(threads.in_order(double, [])) == []


def test_an_error_comes_in_its_place_and_ends_the_work():
  begun = []

  def work(item):
    begun.append(item)
    if item == 3:
      raise ValueError("item 3")
    return item

  results = threads.in_order(work, range(1000))
  assert [next(results) for _ in range(3)] == [0, 1, 2]
  with pytest.raises(ValueError, match="item 3"):
    next(results)
  assert len(begun) < 1000
