import pytest
import torch


@pytest.fixture(params=["cuda" if torch.cuda.is_available() else "cpu"])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)
