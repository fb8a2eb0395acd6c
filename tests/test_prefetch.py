"""Loading bags ahead of their use: in order, a bounded number, errors in their place, and no thread left behind."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing

import numpy as np
import pytest

from wsi_engine.bags import prefetch
from wsi_engine.errors import FeatureError, SettingsError


class Watched:
    """Bags of one number, their place; remembers what was asked for, and may fail, wait, or hold them weakly."""

    dim = 1

    def __init__(self, bad: int | None = None) -> None:
        self.bad = bad
        self.asked: list[int] = []
        self.alive: list[weakref.ref[np.ndarray]] = []
        self.most = 0
        self.gate = threading.Event()
        self.gate.set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return 100

    def tiles(self, place: int) -> int:
        return 1

    def load(self, place: int) -> np.ndarray:
        with self._lock:
            self.asked.append(place)
        assert self.gate.wait(20)
        if place == self.bad:
            raise FeatureError(f"bag {place} is bad")
        bag = np.full((1, 1), place, np.float32)
        with self._lock:
            self.alive.append(weakref.ref(bag))
            self.most = max(self.most, sum(one() is not None for one in self.alive))
        return bag


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("bags")]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize(("workers", "ahead"), [(1, 1), (1, 4), (2, 1), (2, 4), (8, 3)])
def test_prefetched_bags_come_in_order_and_are_few(workers: int, ahead: int) -> None:
    source = Watched()
    places = np.random.default_rng(0).integers(0, 100, 60).tolist()
    got = []
    for place, bag in prefetch(source, places, workers, ahead):
        assert bag[0, 0] == place
        got.append(place)
        due = min(len(got) + ahead, len(places))
        wait_until(lambda due=due: len(source.asked) == due)  # the next ones are loaded while this one is in use
    assert got == places
    # The caller lets go of a bag the moment it is given the next, when another may just have been begun.
    assert source.most <= ahead + 2


def test_nothing_is_begun_while_two_bags_would_be_held() -> None:
    source = Watched()
    loop = prefetch(source, range(9), workers=4, ahead=2)
    next(loop)
    wait_until(lambda: len(source.asked) == 3)
    source.gate.clear()
    next(loop)
    wait_until(lambda: len(source.asked) == 4)
    third: list[object] = []
    thread = threading.Thread(target=lambda: third.extend([next(loop), next(loop)]))
    thread.start()  # bag 2 is there; bag 3 is waited for, and meanwhile only bag 4 is under way beside it
    wait_until(lambda: len(source.asked) == 5)
    time.sleep(0.02)
    assert sorted(source.asked) == list(range(5))
    source.gate.set()
    thread.join()
    loop.close()


def test_a_bag_that_was_handed_over_is_not_kept() -> None:
    source = Watched()
    loop = prefetch(source, range(3), workers=1)
    _, bag = next(loop)
    gone = weakref.ref(bag)
    del bag
    assert gone() is None
    loop.close()


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_comes_when_its_bag_is_due(workers: int) -> None:
    source = Watched(bad=5)
    got = []
    with pytest.raises(FeatureError, match="bag 5 is bad"):
        for place, _ in prefetch(source, range(20), workers):
            got.append(place)
    assert got == [0, 1, 2, 3, 4]
    assert max(source.asked) <= 9


def test_a_consumer_that_stops_early() -> None:
    source = Watched()
    with closing(prefetch(source, range(50), workers=2, ahead=3)) as loop:
        for place, _ in loop:
            if place == 4:
                break
    assert max(source.asked) <= 7


def test_an_interrupt_while_waiting_for_a_bag() -> None:
    class Interrupted(Watched):
        def load(self, place: int) -> np.ndarray:
            if place == 2:
                raise KeyboardInterrupt
            return super().load(place)

    with pytest.raises(KeyboardInterrupt):
        list(prefetch(Interrupted(), range(9)))


def test_an_interrupt_while_a_bag_is_in_use() -> None:
    source = Watched()
    with pytest.raises(KeyboardInterrupt), closing(prefetch(source, range(9))) as loop:
        for place, _ in loop:
            if place == 1:
                raise KeyboardInterrupt
    assert max(source.asked) <= 5


def test_nothing_is_loaded_before_it_is_asked_for() -> None:
    source = Watched()
    loop = prefetch(source, range(9))
    assert source.asked == []
    del loop
    assert list(prefetch(source, [])) == []
    assert source.asked == []


@pytest.mark.parametrize("setting", [{"workers": 0}, {"ahead": 0}])
def test_prefetch_settings_are_checked_at_once(setting: dict[str, int]) -> None:
    with pytest.raises(SettingsError, match="at least 1"):
        prefetch(Watched(), [0], **setting)
