"""One thread: bit-identity across runs, and tests that share two cores with others."""

import gc

import torch

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What is imported stays to the end: without it a full garbage collection, of which many tests ask, is fast."""
    gc.freeze()
