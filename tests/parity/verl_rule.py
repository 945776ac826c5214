"""A rule for verl's ``reward.custom_reward_function``: one number, no credit."""

from __future__ import annotations

from typing import Any


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]
) -> float:
    return len(solution_str) / 7
