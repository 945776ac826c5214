import pytest
import torch

from attnshape.text.score_fn import parse_score_fn

LOGITS = torch.tensor([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]])


@pytest.mark.parametrize(
    ("expression", "want"),
    [
        ("logit[0]", [1.0, 2.0]),
        ("logit[1] - logit[0]", [9.0, 18.0]),
        ("logit[1]-logit[0]", [9.0, 18.0]),
        (" -logit[2]+ 0.5 * logit[1] ", [-95.0, -190.0]),
        ("+.5*logit[0]+2.*logit[0]", [2.5, 5.0]),
        ("logit[0] + logit[0]", [2.0, 4.0]),
    ],
)
def test_linear_expressions(expression: str, want: list[float]) -> None:
    assert parse_score_fn(expression)(LOGITS).tolist() == want


def test_one_label_needs_no_index() -> None:
    logits = LOGITS[:, :1].bfloat16()
    assert parse_score_fn("-2 * logit")(logits).tolist() == [-2.0, -4.0]
    assert parse_score_fn("logit")(logits).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "expression",
    [
        "",
        " ",
        "logit[]",
        "logit[-1]",
        "logit[1.5]",
        "logits[0]",
        "logit[0] logit[1]",
        "logit[0] * 2",
        "logit[0] - ",
        "--logit[0]",
        "2",
        "1e3 * logit[0]",
        "logit[0] / 2",
        "__import__('os').system('true')",
        "logit[0]; logit[1]",
    ],
)
def test_anything_else_is_an_error(expression: str) -> None:
    with pytest.raises(ValueError, match=r"score_fn: got .*, want a sum of terms"):
        parse_score_fn(expression)


def test_labels_that_the_model_does_not_have() -> None:
    with pytest.raises(ValueError, match=r"the model has 2 labels, so 'logit' alone is ambiguous"):
        parse_score_fn("logit").check(2)
    with pytest.raises(ValueError, match=r"got logit\[3\], but the model has 3 labels"):
        parse_score_fn("logit[0] + logit[3]")(LOGITS)
