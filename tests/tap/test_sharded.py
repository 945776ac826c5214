"""Models whose weights are sharded: measured while they are at hand, and nothing raised in a forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import zoo
from support.ranks import failures_of
from support.tap_models import (
    ValueHead,
    assert_row,
    batch,
    build,
    eager_rows,
    positions_of,
    randomise,
)
from torch import nn
from torch.distributed.fsdp import fully_shard

import attnshape
from attnshape import Response, credit
from attnshape.credit import gradient_weights
from attnshape.tap import AttentionTap

CASES: dict[str, Callable[[int, int], None]] = {}


def case(function: Callable[[], None]) -> Callable[[], None]:
    """What every rank runs."""
    CASES[function.__name__] = lambda rank, world: function()
    return function


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return failures_of(CASES, 2, tmp_path_factory.mktemp("ranks"))


def sharded(model: Any, *, by: str = "layer", root: nn.Module | None = None) -> Any:
    for layer in model.base_model.layers:
        if by == "linear":
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    fully_shard(module)
        fully_shard(layer)
    fully_shard(model if root is None else root)
    return model


def response_of(mask: torch.Tensor) -> Response:
    return Response(mask, start=torch.zeros(3, dtype=torch.int32))


def check_sources(by: str, **root: Any) -> None:
    """What each source gives of a model that is sharded is what it gives of the whole model."""
    ids, mask = batch("right")
    whole, parts = build("llama"), sharded(build("llama"), by=by, **root)
    for source, of in (("rollout", attnshape.attention_rollout), ("signed_rollout", credit.signed_rollout)):
        rolled = []
        for model in (whole, parts):
            with torch.no_grad():
                bare = model(ids, attention_mask=mask).logits
                with AttentionTap(model, source=source, check="always") as tap:
                    assert torch.equal(model(ids, attention_mask=mask).logits, bare)
                rolled.append(of(tap.take(), response_of(mask)))
        torch.testing.assert_close(*rolled)
    for source in ("gradient_value", "gradient_embedding", "relevance"):
        weights = []
        for model in (whole, parts):
            with AttentionTap(model, source=source) as tap:
                score = model(ids, attention_mask=mask).logits[:, 0]
            weights.append(gradient_weights(score, tap.take(), response_of(mask)))
        torch.testing.assert_close(*weights)
    with torch.no_grad(), AttentionTap(parts, check="always") as tap:
        parts(ids, attention_mask=mask)
    eager = build("llama", implementation="eager")
    assert_row(tap.take(), eager_rows(eager, -1, positions_of(mask), input_ids=ids, attention_mask=mask))


@case
def layers() -> None:
    check_sources("layer")


@case
def every_linear_layer() -> None:
    check_sources("linear")


@case
def the_first_forward_is_tapped() -> None:
    """A trial before the root has run would take a part for the root."""
    ids, mask = batch("right")
    model = ValueHead(build("llama", head=False))
    randomise(model.value)
    whole = ValueHead(build("llama", head=False))
    whole.value.load_state_dict(model.value.state_dict())
    for layer in model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    with AttentionTap(model, source="rollout") as tap:
        score = model(ids, mask)
    rolled = attnshape.attention_rollout(tap.take(), response_of(mask))
    torch.testing.assert_close(score, whole(ids, mask))
    score.sum().backward()  # training goes on
    with torch.no_grad(), AttentionTap(whole, source="rollout") as tap:
        whole(ids, mask)
    torch.testing.assert_close(rolled, attnshape.attention_rollout(tap.take(), response_of(mask)))


@case
def a_head_that_has_to_be_tried() -> None:
    ids, mask = batch("right")
    torch.manual_seed(0)
    model = zoo.build("BertForSequenceClassification")
    for layer in model.bert.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
    with torch.no_grad(), AttentionTap(model, check="always") as tap:
        model(input_ids=ids, attention_mask=mask)
    assert tap.take().query_position.tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", CASES)
def test_under_fully_shard(name: str, failures: list[dict[str, str]]) -> None:
    found = {rank: failed[name] for rank, failed in enumerate(failures) if name in failed}
    assert not found, "\n".join(found.values())


def detached(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(map(detached, x))
    return x.detach() if isinstance(x, torch.Tensor) else x


class Partitioned:
    """Weights as DeepSpeed's ZeRO-3 keeps them (``_register_hooks_recursively`` in ``parameter_offload.py``).

    A module's first forward pre-hook gathers its own weights and its first forward hook frees them; hooks
    beside them pass what goes in and out through an autograd function, which detaches it.
    """

    def __init__(self, model: nn.Module) -> None:
        for module in model.modules():
            own = list(module.named_parameters(recurse=False))
            if own:
                module.register_forward_pre_hook(lambda m, args, own=own: self.gather(own))
                module.register_forward_hook(lambda m, args, out, own=own: self.free(own))
                self.free(own)
            module.register_forward_pre_hook(lambda m, args: tuple(map(detached, args)))
            module.register_forward_hook(lambda m, args, out: detached(out))

    def gather(self, own: list[tuple[str, nn.Parameter]]) -> None:
        for _, parameter in own:
            parameter.data = parameter.whole

    def free(self, own: list[tuple[str, nn.Parameter]]) -> None:
        for _, parameter in own:
            if parameter.numel():
                parameter.whole = parameter.data
            parameter.data = torch.empty(0, dtype=parameter.dtype)


@pytest.mark.parametrize("source", ["rollout", "signed_rollout"])
def test_weights_that_are_there_for_their_own_module_only(source):
    ids, mask = batch("left")
    roll = attnshape.attention_rollout if source == "rollout" else credit.signed_rollout
    response = Response(mask, start=torch.zeros(3, dtype=torch.int32))
    rolled = []
    for is_partitioned in (False, True):
        model = build("llama")
        if is_partitioned:
            Partitioned(model)
        with torch.no_grad(), AttentionTap(model, source=source) as tap:
            model(ids, attention_mask=mask)
        rolled.append(roll(tap.take(), response))
    torch.testing.assert_close(*rolled)
    assert all(parameter.numel() == 0 for parameter in model.parameters())
