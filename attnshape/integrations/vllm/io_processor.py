"""Completions as data: ``POST /pooling {"data": …}``, or ``LLM.encode({"data": …}, pooling_task="plugin")``.

``data`` is what ``POST /score`` of ``attnshape serve`` takes, one completion or a list; so are the answers.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from vllm import PoolingParams
from vllm.plugins.io_processors.interface import IOProcessor

from attnshape.integrations.vllm.answers import asking, reader_of, scored
from attnshape.integrations.vllm.support import Settings
from attnshape.serve.app import read_all
from attnshape.serve.protocol import Completion, answer, parse
from attnshape.text.reader import Example

MOST_REQUESTS = 4096
"""Remembered between a request and its answer: vLLM does not say which of them it gave up."""


class CreditProcessor(IOProcessor[list[Completion], list[dict[str, Any]]]):  # type: ignore[misc]
    """Text in, score and credit out."""

    def __init__(self, vllm_config: Any, renderer: Any) -> None:
        super().__init__(vllm_config, renderer)
        self._score_fn = Settings.of(vllm_config.additional_config).score_fn
        self._reader = reader_of(vllm_config.model_config, renderer.tokenizer)
        self._examples: OrderedDict[str | None, list[Example | str]] = OrderedDict()
        self._lock = threading.Lock()

    def parse_data(self, data: object) -> list[Completion]:
        """Raises ValueError for what is no completion."""
        parsed = parse(json.dumps(data).encode())
        return parsed if isinstance(parsed, list) else [parsed]

    def pre_process(self, prompt: list[Completion], request_id: str | None = None, **_: Any) -> Sequence[Any]:
        """The model's tokens of each completion that it takes; raises ValueError where it takes none."""
        with self._lock:
            examples = read_all(prompt, self._reader)
            read = [example for example in examples if not isinstance(example, str)]
            if not read:
                raise ValueError(examples[0])
            self._examples[request_id] = examples
            if len(self._examples) > MOST_REQUESTS:
                self._examples.popitem(last=False)
        return [{"prompt_token_ids": example.input_ids} for example in read]

    def merge_pooling_params(self, params: PoolingParams | None = None) -> PoolingParams:
        """Those that ask for the row, whatever the request says."""
        return asking()

    def post_process(
        self, model_output: Sequence[Any], request_id: str | None = None, **_: Any
    ) -> list[dict[str, Any]]:
        """An answer or an error for each completion, in their order."""
        with self._lock:
            examples = self._examples.pop(request_id, None)
        if examples is None:
            raise RuntimeError(f"more than {MOST_REQUESTS} requests at once: the oldest are forgotten")
        outputs = iter(model_output)
        return [
            {"error": example}
            if isinstance(example, str)
            else answer(example, scored(example, next(outputs).outputs.data, self._score_fn))
            for example in examples
        ]
