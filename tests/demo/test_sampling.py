import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from attnshape.demo.sampling import can_sample, sample_gpt2

PAD, END = 0, 1


def model(**options: object) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=20,
        n_positions=40,
        n_embd=24,
        n_layer=2,
        n_head=3,
        initializer_range=0.4,
        bos_token_id=2,
        eos_token_id=END,
        pad_token_id=PAD,
        **options,
    )
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize(("new_tokens", "min_new_tokens"), [(1, 0), (12, 0), (12, 5), (20, 20)])
def test_draws_are_those_of_generate(new_tokens: int, min_new_tokens: int) -> None:
    policy = model()
    policy.generation_config = GenerationConfig(eos_token_id=END, pad_token_id=PAD)
    ids = torch.randint(2, 20, (24, 6))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 1, 3, 5)):
        ids[row, :padding], mask[row, :padding] = PAD, 0
    torch.manual_seed(5)
    expected = policy.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        min_new_tokens=min_new_tokens,
        max_new_tokens=new_tokens,
    )
    torch.manual_seed(5)
    drawn = sample_gpt2(
        policy, ids, mask, new_tokens=new_tokens, min_new_tokens=min_new_tokens, end_ids=[END], pad_id=PAD
    )
    assert torch.equal(drawn, expected)
    if min_new_tokens < new_tokens - 1:  # some rows end early, so padding was compared too
        assert (drawn[:, 6:-1] == END).any()


def test_only_models_it_computes() -> None:
    assert can_sample(model())
    assert not can_sample(model().train())
    assert not can_sample(model(scale_attn_by_inverse_layer_idx=True))
    assert not can_sample(model(scale_attn_weights=False))
    llama = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8
        )
    )
    assert not can_sample(llama.eval())
