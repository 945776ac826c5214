from __future__ import annotations

from collections.abc import Iterator

import pytest
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama


@pytest.fixture(autouse=True)
def everything_is_restored() -> Iterator[None]:
    yield
    assert ALL_ATTENTION_FUNCTIONS._local_mapping == {}
    assert not hasattr(modeling_llama.eager_attention_forward, "__wrapped__")
