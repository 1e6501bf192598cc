import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
os.environ["OMP_NUM_THREADS"] = "1"  # for commands that leave torch its default; several tests run side by side

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A test that leaves torch with more would slow down all that follow it in the process."""
    yield
    left = torch.get_num_threads()
    torch.set_num_threads(1)
    assert left == 1
