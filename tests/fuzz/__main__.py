"""python -m tests.fuzz config|plan|metadata|safetensors [--minutes 10] [--seed 0]

Tries examples until the time is up; stops with the smallest example that fails, and the seed that
finds it again.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, seed, settings

from tests.fuzz.targets import TARGETS
from tests.fuzz.watch import Watchdog, limit

AT_ONCE = 500  # examples of one seed


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    os.environ["HF_HUB_OFFLINE"] = "1"  # a name that is made up is not asked for
    asked = parser.parse_args(arguments)
    target = TARGETS[asked.target]
    tried = slowest = 0.0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:

        def watched(example: Any) -> None:
            nonlocal tried, slowest
            with Watchdog() as watch:
                target.check(example, Path(name))
            tried += 1
            slowest = max(slowest, time.process_time() - watch.began)

        number, end = asked.seed, time.monotonic() + 60 * asked.minutes
        limit()
        while time.monotonic() < end:
            try:
                seed(number)(_unlimited(given(target.examples())(watched)))()
            except BaseException:
                print(f"seed {number}, after {tried:.0f} examples", file=sys.stderr)
                raise
            number += 1
    print(f"{asked.target}: {tried:.0f} examples, no finding; the slowest took {slowest:.2f} s")


def _unlimited(test: Any) -> Any:
    return settings(
        max_examples=AT_ONCE,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )(test)


if __name__ == "__main__":
    main(sys.argv[1:])
