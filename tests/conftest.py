"""One thread and a seed: bit-identity across runs, tests that share two cores with others, and no test that depends on
those before it.
"""

import gc

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What is imported stays to the end: without that a full garbage collection, of which many tests ask, is fast."""
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Before the fixtures, too."""
    torch.manual_seed(0)
