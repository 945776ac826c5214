"""``shape_rewards`` of every backend against the float64 reference."""

import dataclasses

import pytest
import torch
from support.backends import (
    DEVICE,
    INTERPRETED,
    KEEPS_BITS,
    drawn,
    each_backend,
    each_backend_with,
    here,
    there,
)
from support.problems import Problem, check_shaped, make_problem, problems

import attnshape
from attnshape import KL, ShapingConfig, Status

TOKENS = ("credit", "values", "logprobs", "ref_logprobs", "token_rewards", "mask")
OUTPUTS = ("rewards", "advantages", "returns", "credit", "kl")


@drawn(problems(), cpu=150, torch=150, triton=30)
def test_shape_rewards(backend: str, problem: Problem) -> None:
    check_shaped(problem, backend, DEVICE)


@each_backend_with(
    where=["key", "query", "score", "values", "logprobs", "token_rewards"],
    value=[float("nan"), float("inf"), float("-inf")],
    on_nan=["propagate", "zero_row"],
)
def test_non_finite_inputs_stay_in_their_row(backend: str, where: str, value: float, on_nan: str) -> None:
    problem = make_problem(5, batch=3, holes=False, config=ShapingConfig(on_nan=on_nan, lam=0.95))
    problem.response.mask[1, 0] = 1
    assert problem.response.start is not None
    if where == "key":
        key = problem.inputs.key.clone()
        key[1, 0, int(problem.response.start[1])] = value
        problem.credit = dataclasses.replace(problem.inputs, key=key)
    elif where == "query":
        problem.inputs.query[1, 0, 0] = value
    elif where == "score":
        problem.score[1] = value
    elif where == "logprobs":
        problem.given["kl"].logprobs[1, 0] = value
    else:
        problem.given[where][1, 0] = value
    check_shaped(problem, backend, DEVICE)
    out = here(there(problem).shaped(attnshape.shape_rewards, backend=backend))
    assert out.rewards[[0, 2]].isfinite().all()
    assert out.metrics["nan_rows"] == (out.status & int(Status.NONFINITE) != 0).sum()
    if on_nan == "zero_row":
        assert out.advantages.isfinite().all()


@each_backend
@pytest.mark.parametrize("normalization", ["sum_to_one", "sum_to_length", "none"])
def test_a_negative_weight_makes_its_row_sparse(backend: str, normalization: str) -> None:
    problem = make_problem(2, batch=4, holes=False, config=ShapingConfig(normalization=normalization))
    problem.response.mask[:, :3] = 1
    weights = torch.rand(4, 9)
    weights[1, 1], weights[2, 2] = -1e-3, -0.5
    weights[2, 0] = torch.nan
    weights[3] = torch.where(problem.response.mask[3] == 0, -1.0, weights[3])  # masked ones are not looked at
    signed = dataclasses.replace(problem, credit=weights)
    signed.given = {name: x.nan_to_num(0.0) for name, x in problem.given.items() if name == "values"}
    check_shaped(signed, backend, DEVICE)
    out = here(there(signed).shaped(attnshape.shape_rewards, backend=backend))
    both = int(Status.FALLBACK | Status.NEGATIVE)
    assert [int(x) & both for x in out.status] == [0, both, 0, 0]
    assert out.metrics["negative_rows"] == 1
    last = int(signed.response.mask[1].nonzero().max())
    assert out.credit[1].nonzero().flatten().tolist() == [last]


@pytest.mark.parametrize("backend", KEEPS_BITS)
@pytest.mark.parametrize("lam", [1.0, 0.95, "per row"])
@pytest.mark.parametrize("holes", [False, True])
def test_bits_of_a_row_depend_on_nothing_else(backend: str, lam: float | str, holes: bool) -> None:
    """Alone, in any batch, however it is padded."""
    rows, width = 7, 300
    g = torch.Generator().manual_seed(int(holes))
    lengths = torch.tensor([300, 1, 31, 33, 64, 65, 257])
    mask = torch.arange(width) < lengths[:, None]
    if holes:
        mask &= torch.rand(rows, width, generator=g) > 0.2
    tokens = dict(zip(TOKENS, torch.randn(6, rows, width, generator=g), strict=True))
    tokens |= {"credit": tokens["credit"].abs(), "mask": mask.float()}
    score, lams = torch.randn(rows, generator=g), torch.linspace(0.5, 1.0, rows)

    def shaped(which: slice, padding: int = 0) -> list[torch.Tensor]:
        x = {name: there(torch.nn.functional.pad(x[which], (0, padding))) for name, x in tokens.items()}
        config = ShapingConfig(lam=there(lams[which]) if isinstance(lam, str) else lam)
        out = shape(there(score[which]), x, backend, config)
        return [x[:, :width] for x in out]

    whole, paddings = shaped(slice(0, rows)), (0, 1, 20, 700)
    for b in range(rows):
        for padding in (paddings[b % 4],) if INTERPRETED and backend == "triton" else paddings:
            for x, alone in zip(whole, shaped(slice(b, b + 1), padding), strict=True):
                assert torch.equal(x[b : b + 1], alone)


def shape(
    score: torch.Tensor, x: dict[str, torch.Tensor], backend: str, config: ShapingConfig
) -> list[torch.Tensor]:
    out = attnshape.shape_rewards(
        score,
        x["credit"],
        x["mask"],
        values=x["values"],
        kl=KL(x["logprobs"], x["ref_logprobs"], 0.1),
        token_rewards=x["token_rewards"],
        config=config,
        backend=backend,
    )
    return [getattr(out, name) for name in OUTPUTS]


@each_backend
def test_any_strides(backend: str) -> None:
    g = torch.Generator().manual_seed(0)
    tokens = {name: there(torch.rand(5, 128, generator=g)) for name in TOKENS}
    score = there(torch.randn(5, generator=g))

    def strided(x: torch.Tensor, how: int) -> torch.Tensor:
        wide = torch.full((5, 256), float("nan"), device=DEVICE)
        places = (wide.t().contiguous().t()[:, :128], wide[:, ::2], wide[:, 1:129])
        return places[how].copy_(x)

    config = ShapingConfig(lam=0.9)
    want = shape(score, tokens, backend, config)
    rewards, mask = tokens["token_rewards"], torch.ones(5, 128, device=DEVICE)
    wanted = attnshape.gae(rewards, None, mask, config, backend=backend)
    for how in range(3):
        places = {name: strided(x, how) for name, x in tokens.items()}
        got = attnshape.gae(strided(rewards, how), None, strided(mask, how), config, backend=backend)
        bound = {"rtol": 0, "atol": 0} if backend in KEEPS_BITS else {"rtol": 1e-5, "atol": 1e-5}
        for x, expected in zip([*shape(score, places, backend, config), *got], [*want, *wanted], strict=True):
            torch.testing.assert_close(x, expected, **bound)


@each_backend
def test_no_output_shares_memory_with_another(backend: str) -> None:
    ones = torch.ones(2, 40, device=DEVICE)
    out = attnshape.shape_rewards(torch.ones(2, device=DEVICE), "uniform", ones, backend=backend)
    pointers = {x.data_ptr() for x in (out.rewards, out.advantages, out.returns, out.credit, ones)}
    assert len(pointers) == 5


@each_backend
def test_outputs_are_detached(backend: str) -> None:
    problem = there(make_problem(0))
    query = problem.inputs.query.requires_grad_()
    values = problem.given["values"].requires_grad_()
    out = problem.shaped(attnshape.shape_rewards, backend=backend)
    assert query.requires_grad
    assert values.requires_grad
    assert not out.rewards.requires_grad
    assert not out.advantages.requires_grad
