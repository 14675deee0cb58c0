"""Every test starts from one seed, and uninitialised memory is NaN: an output that nobody wrote cannot pass."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # with this on, PyTorch fills torch.empty with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return torch.device(request.param)
