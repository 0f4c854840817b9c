"""A progress bar for loops that may take long: after a second, on a terminal, where tqdm is there.

fp8 does not require tqdm; without it, and with `FP8_PROGRESS=0`, there is no bar.
"""

import os
import sys
import time
from collections.abc import Collection, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

DELAY = 1.0
"""Seconds until there is one: what ends before needs none."""


def progress(items: Collection[T], title: str, unit: str) -> Iterator[T]:
    """The items, with a bar on stderr from the first one that comes later than DELAY.

    Args:
        title: what is in front of the bar, "fp8.autotune".
        unit: what an item is, in the singular.
    """
    if not _is_wanted():
        yield from items
        return
    bar: Any = None
    begun = time.monotonic()
    try:
        for done, item in enumerate(items):
            if bar is None and time.monotonic() - begun > DELAY:
                bar = _bar(title, unit, len(items), done)
            yield item
            if bar is not None:
                bar.update()
    finally:
        if bar is not None:
            bar.close()


def _is_wanted() -> bool:
    return os.environ.get("FP8_PROGRESS") != "0" and sys.stderr.isatty()


class _Silent:
    def update(self) -> None:
        pass

    def close(self) -> None:
        pass


def _bar(title: str, unit: str, total: int, done: int) -> Any:
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        return _Silent()
    return tqdm(desc=title, unit=unit, total=total, initial=done, leave=False, file=sys.stderr)
