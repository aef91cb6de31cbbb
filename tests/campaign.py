"""Property tests with many random examples: `python tests/campaign.py --seed 3 --examples 2000 [-k expression]`.

The suite draws the same few examples in every run; a campaign draws others, and the same ones for the same seed.
"""

import argparse
import functools
import itertools
import sys

import hypothesis
import jax
import pytest


class Campaign:
    """Gives every property test its number of examples."""

    def __init__(self, examples: int):
        self.examples = examples

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if item.get_closest_marker("hypothesis"):
                test, settings = item.obj, item.obj._hypothesis_internal_use_settings
                test._hypothesis_internal_use_settings = hypothesis.settings(
                    settings, max_examples=self.examples, derandomize=False
                )
                test.hypothesis.inner_test = dropping_programs(test.hypothesis.inner_test)


def dropping_programs(test):
    """Examples of many shapes would compile more programs than a process has room for."""
    calls = itertools.count(1)

    @functools.wraps(test)
    def run(*args, **kwargs):
        if next(calls) % 50 == 0:
            jax.clear_caches()
        test(*args, **kwargs)

    return run


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("-k", default="", help="which tests, as pytest selects them")
    arguments = parser.parse_args()
    options = ["-n", "0", "-m", "hypothesis", "-k", arguments.k, f"--hypothesis-seed={arguments.seed}"]
    sys.exit(pytest.main([*options, "-p", "no:cacheprovider"], plugins=[Campaign(arguments.examples)]))
