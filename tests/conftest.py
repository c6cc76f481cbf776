"""One thread: bit-identity across runs, and tests that share two cores with others."""

import torch

torch.set_num_threads(1)
