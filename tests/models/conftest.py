"""One thread: what these tests time-share is two cores at best."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # two threads on a busy machine turn float64 depthwise convolutions from ms into minutes
