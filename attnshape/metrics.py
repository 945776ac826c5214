"""What a run's log takes."""

from __future__ import annotations

import torch

from attnshape.types import GroupAdvantages, ShapedRewards


def log_metrics(out: ShapedRewards | GroupAdvantages, prefix: str = "attnshape/") -> dict[str, float]:
    """``out.metrics`` as plain floats, for wandb, tensorboard, trackio and their like.

    One transfer from the device, which waits for it.

    Raises:
        TypeError: ``out`` is something else, such as what ``gae`` returned, which has no metrics.

    Args:
        out: what ``shape_rewards`` or ``group_advantages`` returned.
        prefix: of every name.

    Examples:
        >>> import torch
        >>> from attnshape import shape_rewards
        >>> out = shape_rewards(torch.tensor([1.0]), "sparse", torch.ones(1, 2))
        >>> log_metrics(out)["attnshape/credit_last_share"]
        1.0
    """
    if not isinstance(out, ShapedRewards | GroupAdvantages):
        raise TypeError(
            f"out: got {type(out).__name__}, want what shape_rewards or group_advantages returned"
        )
    metrics = out.metrics
    values: list[float] = torch.stack([x.float() for x in metrics.values()]).tolist()
    return {prefix + name: value for name, value in zip(metrics, values, strict=True)}
