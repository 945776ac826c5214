"""The presets against what the frameworks' real functions gave (``make parity``), and the reference."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import check, golden
from parity.cases import CHOICES
from support.backends import BACKENDS, each_backend
from support.problems import check_shaped

import attnshape
from attnshape import KL, Response, ShapingConfig, Status, Whitening, reference
from attnshape.problems import make_problem

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRESETS = {
    "verl": (1.0, 1.0),
    "trl": (1.0, 0.95),
    "openrlhf": (1.0, 1.0),
    "slime": (1.0, 1.0),
    "nemo_rl": (1.0, 0.95),
    "areal": (1.0, 1.0),
}
"""Default gamma and lam."""


def test_there_are_golden_vectors_of_every_framework() -> None:
    assert golden.names() == sorted(CHOICES)
    assert golden.FILE.stat().st_size < 300_000
    assert golden.FILE.with_name("results.md").read_text() == golden.table()


@each_backend
@pytest.mark.parametrize("framework", CHOICES)
def test_as_the_framework(framework: str, backend: str) -> None:
    recorded = golden.load(framework)
    found = [
        # The interpreter is slow: it takes the first cases.
        check.errors(framework, case, outputs, backend=backend if i < 2 or DEVICE.type == "cuda" else "torch")
        for i, (case, outputs) in enumerate(zip(recorded.cases, recorded.outputs, strict=True))
    ]
    assert not check.excess(check.worst(found)), check.worst(found)


def test_another_setting_is_too_far(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = golden.load("verl")
    original = check.preset

    def changed(field: str, value: Any) -> None:
        def preset(*args: Any) -> Any:
            config, *rest = original(*args)
            object.__setattr__(config, field, value)
            return config, *rest

        monkeypatch.setattr(check, "preset", preset)

    def excess() -> list[str]:
        pairs = zip(recorded.cases, recorded.outputs, strict=True)
        return check.excess(check.worst([check.errors("verl", *pair) for pair in pairs]))

    wrong = {
        "mask_semantics": ("zero", ["returns", "whitened"]),
        "carry_masked": (False, ["returns", "whitened"]),
        "score_index": ("last_unmasked", ["rewards", "returns", "whitened"]),
        "kl_output_clip": (None, ["rewards", "returns", "whitened"]),
        "whitening": (Whitening(), ["whitened"]),
        "gamma": (0.98, ["returns", "whitened"]),
    }
    for field, (value, outputs) in wrong.items():
        changed(field, value)
        assert excess() == outputs, field


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_masks_of_any_dtype(dtype: torch.dtype) -> None:
    case = golden.load("openrlhf").cases[1]
    want = check.ours("openrlhf", case)
    case.inputs["mask"] = case.inputs["mask"].to(dtype)
    for name, x in check.ours("openrlhf", case).items():
        assert torch.equal(x, want[name])


@settings(max_examples=24)
@given(
    st.sampled_from(list(PRESETS)),
    st.sampled_from([*BACKENDS[:-1], *BACKENDS]),
    st.integers(0, 2**20),
    st.integers(1, 4),
    st.integers(1, 20),
    st.sampled_from([1.0, 0.99]),
    st.sampled_from([1.0, 0.95]),
    st.sampled_from(["logprobs", "kl", ""]),
    st.booleans(),
)
def test_dense_rewards_as_the_reference(
    name: str,
    backend: str,
    seed: int,
    batch: int,
    width: int,
    gamma: float,
    lam: float,
    kl: str,
    left_padding: bool,
) -> None:
    config = getattr(ShapingConfig, name)(gamma=gamma, lam=lam)
    problem = make_problem(
        seed, batch=batch, width=width, kl=kl, left_padding=left_padding, extras=False, config=config
    )
    check_shaped(problem, backend, DEVICE if backend == "triton" else "cpu")
    mask = problem.response.mask
    x = torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed))
    got = attnshape.whiten(x.to(DEVICE), mask.to(DEVICE), config.whitening, backend=backend)
    want = reference.whiten(x.double(), mask, config.whitening)
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PRESETS)
def test_defaults_and_overrides(name: str) -> None:
    preset = getattr(ShapingConfig, name)
    config = preset()
    assert type(config) is ShapingConfig
    assert (config.gamma, config.lam) == PRESETS[name]
    assert config.dense_share == ShapingConfig().dense_share
    changed = preset(lam=0.5, dense_share=1.0, kl_output_clip=3.0, whitening=Whitening(eps=1.0))
    assert (changed.lam, changed.dense_share, changed.kl_output_clip) == (0.5, 1.0, 3.0)
    assert changed.whitening == Whitening(eps=1.0)
    assert changed.mask_semantics == config.mask_semantics
    with pytest.raises(TypeError, match="gama"):
        preset(gama=1.0)
    with pytest.raises(ValueError, match="kl_estimator: got 'kl2', want one of"):
        preset(kl_estimator="kl2")


def test_full_kl_is_given_ready_made() -> None:
    for name in PRESETS:
        with pytest.raises(ValueError, match=r"logits over the whole vocabulary; .* as kl"):
            getattr(ShapingConfig, name)(kl_estimator="full")
    # What TRL's "full" is, on logits: its own words, summed over the vocabulary.
    logprobs, ref_logprobs = torch.randn(2, 1, 3, 5, dtype=torch.float64).log_softmax(-1)
    kl = (logprobs.exp() * (logprobs - ref_logprobs)).sum(-1)
    out = attnshape.shape_rewards(
        torch.ones(1, dtype=torch.float64),
        "sparse",
        torch.ones(1, 3),
        kl=KL.given(kl, 0.5),
        config=ShapingConfig.trl(),
    )
    torch.testing.assert_close(out.rewards, torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64) - 0.5 * kl)


def test_kl_has_the_frameworks_names() -> None:
    for name in ("low_var_kl", "k3", "k3+", "low_var_kl+"):
        config = ShapingConfig.verl(kl_estimator=name)
        assert (config.kl_estimator, config.kl_input_clip, config.kl_output_clip) == ("k3", 20.0, 10.0)
    assert ShapingConfig.verl(kl_estimator="mse").kl_output_clip is None
    assert ShapingConfig.slime(kl_estimator="k3").kl_output_clip is None
    assert ShapingConfig.slime(kl_estimator="low_var_kl").kl_output_clip == 10.0
    with pytest.raises(ValueError, match=r"want one of kl, abs, mse, as in TRL 0\.11"):
        ShapingConfig.trl(kl_estimator="k3")
    assert ShapingConfig.trl(version="1.12", kl_estimator="k3").kl_estimator == "k3"
    with pytest.raises(ValueError, match=r"version: got '0\.12', want"):
        ShapingConfig.trl(version="0.12")


@each_backend
@pytest.mark.parametrize("dense_share", [0.8, 0.1, 1 / 3])
def test_without_abc_the_reward_is_the_score_itself(backend: str, dense_share: float) -> None:
    score = torch.linspace(-9, 9, 40, device=DEVICE)
    mask = torch.ones(40, 3, device=DEVICE)
    config = ShapingConfig.verl(dense_share=dense_share)
    out = attnshape.shape_rewards(score, "sparse", mask, config=config, backend=backend)
    assert torch.equal(out.rewards[:, 2], score)
    assert not out.rewards[:, :2].any()


def test_a_score_on_a_masked_last_token_is_lost_as_in_verl_or_kept() -> None:
    attention = torch.tensor([[1, 1, 1, 1, 0]])
    mask = torch.tensor([[1, 1, 0, 0, 0]])  # two tokens of a tool come last
    score, values = torch.tensor([2.0]), torch.zeros(1, 5)
    losing = ShapingConfig.verl(score_index=attention.sum(1) - 1)
    lost = attnshape.shape_rewards(score, "sparse", mask, values=values, config=losing)
    assert not lost.advantages.any()
    assert lost.status.tolist() == [Status.SCORE_MASKED]
    kept = attnshape.shape_rewards(score, "sparse", mask, values=values, config=ShapingConfig.verl())
    assert kept.rewards.tolist() == [[0.0, 2.0, 0.0, 0.0, 0.0]]
    assert kept.status.tolist() == [0]


def shaped(config: ShapingConfig, mask: list[list[int]], **options: Any) -> Any:
    score, response = torch.ones(len(mask)), torch.tensor(mask)
    return attnshape.shape_rewards(score, "uniform", response, config=config, validate=True, **options)


@pytest.mark.parametrize(
    ("config", "good", "bad", "message"),
    [
        (ShapingConfig.verl(), [1, 0, 1, 0], [0, 1, 1, 0], "token 0 of row 1 is masked, want the response"),
        (ShapingConfig.slime(), [1, 1, 1, 0], [1, 0, 1, 0], "token 1 of row 1 is masked and a later one"),
        (
            ShapingConfig.trl(version="1.12"),
            [1, 1, 0, 0],
            [0, 1, 1, 0],
            "token 0 of row 1 is masked and a later one",
        ),
        (
            ShapingConfig.areal(),
            [0, 1, 1, 0],
            [0, 1, 1, 1],
            "token 3 of row 1 is unmasked, want masks rolled",
        ),
    ],
    ids=["verl", "slime", "trl", "areal"],
)
def test_another_frameworks_layout(
    config: ShapingConfig, good: list[int], bad: list[int], message: str
) -> None:
    assert shaped(config, [good, good, [0, 0, 0, 0]]).status.tolist() == [0, 0, Status.EMPTY]
    with pytest.raises(ValueError, match=f"response.mask: {message}"):
        shaped(config, [good, bad])
    for name in ("trl", "openrlhf", "nemo_rl"):  # whole sequences, padded on either side, with holes
        assert not shaped(getattr(ShapingConfig, name)(), [good, bad]).status.any()


def test_a_packed_prefix_is_held_row_by_row() -> None:
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    score, options = torch.ones(2), {"config": ShapingConfig.slime(), "validate": True}

    def packed(mask: list[int]) -> Response:
        return Response(torch.tensor(mask), cu_seqlens=cu_seqlens)

    attnshape.shape_rewards(score, "sparse", packed([1, 0, 1, 1, 0]), **options)
    with pytest.raises(ValueError, match="token 0 of row 1 is masked and a later one is not"):
        attnshape.shape_rewards(score, "sparse", packed([1, 1, 0, 1, 1]), **options)


def test_presets_are_compiled() -> None:
    torch.compiler.reset()
    g = torch.Generator().manual_seed(0)
    score, values = torch.randn(3, generator=g), torch.randn(3, 5, generator=g)
    mask = torch.rand(3, 5, generator=g) < 0.7

    def call(score: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        config = ShapingConfig.verl(lam=0.9)
        out = attnshape.shape_rewards(score, "sparse", mask, values=values, config=config)
        return attnshape.whiten(out.advantages, mask, config.whitening)

    compiled = torch.compile(call, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(score, values, mask), call(score, values, mask))
    assert math.isfinite(call(score, values, mask).sum().item())
