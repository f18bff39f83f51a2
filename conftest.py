"""What holds for every test of this repository. Refused here: fixtures; a folder has its own."""

from __future__ import annotations

import gc


def pytest_collection_finish() -> None:
    """Set aside what there is by now, once: the suite also runs within tests, in this process.

    Thousands of tests and several frameworks are half a million objects that live as long as the process. Every full
    collection walked all of them, a quarter of a second each time, also where a test collects before it measures.
    """
    if gc.get_freeze_count() == 0:
        gc.collect()
        gc.freeze()
