"""What ``make parity`` stands on: signatures are checked, pins exact, a checkout's functions cut out."""

from pathlib import Path

import pytest
import torch
from parity import __main__ as main
from parity import check, drivers
from parity.adapters import ADAPTERS
from parity.cases import CHOICES, WHOLE_SEQUENCE, draw
from parity.groups import FORMULAS
from parity.options import parse


def test_a_function_of_another_shape_is_refused() -> None:
    def gae(rewards: object, values: object, *, mask: object) -> None: ...

    drivers.expect(gae, "rewards values mask")
    with pytest.raises(drivers.Changed, match=r"gae\(rewards values mask\), want \(values rewards mask\)"):
        drivers.expect(gae, "values rewards mask")


def test_functions_are_cut_out_of_a_checkout(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import absent\n\ndef twice(x: absent.T) -> int:\n    return 2 * x\n")
    (tmp_path / "b.py").write_text("class B:\n    def four(self):\n        return twice(2)\n")
    found = drivers.cut(tmp_path, {"a.py": ["twice"], "b.py": ["B"]}, {})
    assert found.B().four() == 4
    with pytest.raises(drivers.Changed, match=r"a\.py has no thrice"):
        drivers.cut(tmp_path, {"a.py": ["twice", "thrice"]}, {})


def test_requirements_are_pinned() -> None:
    presets = {main.ENVIRONMENTS.get(name, name) for name in drivers.PACKAGES}
    assert {*main.REQUIREMENTS} == presets | {*ADAPTERS, "vllm"}  # which `make vllm` installs
    assert {*drivers.PACKAGES, *drivers.CHECKOUTS} == set(CHOICES)
    for name, pins in main.REQUIREMENTS.items():
        assert all("==" in pin for packages in pins.values() for pin in packages), name


@pytest.mark.parametrize("framework", FORMULAS)
def test_groups_hold_what_is_hard(framework: str) -> None:
    cases = [draw(framework, seed) for seed in range(40)]
    for name, values in CHOICES[framework].items():
        assert {case.settings[name] for case in cases} == set(values)
    sizes = [case.inputs["group"].bincount().tolist() for case in cases]
    assert any(1 in found for found in sizes) == (framework == "verl-groups")  # a group of one
    assert all(len(set(found)) == 1 for found in sizes) == (framework != "verl-groups")
    masks = torch.stack([case.inputs["mask"] for case in cases])
    assert (masks.sum(-1) == 1).any()  # one token
    assert (~masks & (masks.cumsum(-1) > 0)).any()  # holes, or padding
    if framework == "trl-groups":
        lost = torch.stack([case.inputs["score"].isnan() for case in cases])
        assert lost.all(-1).any()  # a completion without any reward


@pytest.mark.parametrize("framework", [name for name in CHOICES if name not in FORMULAS])
def test_cases_hold_what_is_hard(framework: str) -> None:
    cases = [draw(framework, seed) for seed in range(40)]
    assert torch.equal(draw(framework, 3).inputs["values"], cases[3].inputs["values"])
    assert {(case.settings["gamma"], case.settings["lam"]) for case in cases} >= {(1.0, 1.0), (1.0, 0.95)}
    if framework == "torchrl":
        return
    for name, values in CHOICES[framework].items():
        assert {case.settings[name] for case in cases} == set(values)
    masks = torch.stack([case.inputs["mask"] for case in cases])
    attended = torch.stack([case.inputs["attended"] for case in cases])
    lengths = masks.sum(-1)
    assert (lengths == 1).any()  # one token
    assert attended.all(-1).any()  # no padding
    padded_left = ~attended[..., 0]
    assert bool(padded_left.any()) == (framework in WHOLE_SEQUENCE and framework != "areal")
    holes = (attended & ~masks & (masks.cumsum(-1) > 0)).any()
    assert bool(holes) == (framework != "trl-1.12.0")
    ratio = torch.stack([case.inputs["logprobs"] - case.inputs["ref_logprobs"] for case in cases])
    assert ratio.abs().max() > 20


def test_an_infinite_error_is_in_excess() -> None:
    assert check.excess({"a": (1e-7, 2e-7), "b": (1e-7, 2.1e-7), "c": (1e-7, float("nan"))}) == ["b", "c"]
    assert check.worst([{"a": (1.0, 2.0)}, {"a": (3.0, 1.0)}]) == {"a": (3.0, 2.0)}


def test_a_frameworks_name_stands_for_its_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {*CHOICES, *ADAPTERS}
    monkeypatch.setattr("sys.argv", ["parity", "verl", "trl", "--checkout", "slime=there"])
    options = parse(None, known)
    of_trl = sorted(name for name in known if name.startswith("trl-"))
    assert options.frameworks == ["verl", "verl-groups", *of_trl]
    assert options.checkouts == {"slime": Path("there")}
    monkeypatch.setattr("sys.argv", ["parity", "trlx"])
    with pytest.raises(SystemExit):
        parse(None, known)
    assert all((main.HERE / f"test_{name}_adapter.py").exists() for name in ADAPTERS.values())
