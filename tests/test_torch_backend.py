"""The vectorised PyTorch backend against the float64 reference."""

from hypothesis import given, settings

from problems import Problem, check_shaped, problems


@settings(max_examples=200)
@given(problems())
def test_shape_rewards_matches_the_reference(problem: Problem) -> None:
    check_shaped(problem, "torch")
