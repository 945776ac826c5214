"""One PPO step of a loop of your own: a reward model that is tapped, a critic, a KL penalty, whitening."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import attnshape

torch.manual_seed(0)
B, P, R, EOS = 4, 6, 10, 2  # completions, tokens of a prompt, of a response
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": EOS, "vocab_size": 100}
policy = LlamaForCausalLM(LlamaConfig(**SIZES, **SPECIAL))
reference = LlamaForCausalLM(LlamaConfig(**SIZES, **SPECIAL)).eval()
reference.load_state_dict(policy.state_dict())
critic = nn.Linear(SIZES["hidden_size"], 1)
reward_model = LlamaForSequenceClassification(LlamaConfig(num_labels=1, **SIZES, **SPECIAL)).eval()

prompt = torch.randint(3, 100, (B, P))
with torch.no_grad():  # sample until the end-of-text token
    ids = policy.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=True, max_new_tokens=R)
ids = nn.functional.pad(ids, (0, P + R - ids.shape[1]))
response_mask = (ids[:, P:] == EOS).cumsum(1) - (ids[:, P:] == EOS).long() == 0
mask = torch.cat([torch.ones(B, P), response_mask], 1).long()


def evaluate(model: LlamaForCausalLM) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the response's tokens, and the states they were chosen in."""
    out = model(ids, attention_mask=mask, output_hidden_states=True)
    logprobs = out.logits[:, P - 1 : -1].log_softmax(-1).gather(2, ids[:, P:, None])[..., 0]
    return logprobs, out.hidden_states[-1][:, P - 1 : -1]


with torch.no_grad(), attnshape.AttentionTap(reward_model) as tap:
    score = reward_model(ids, attention_mask=mask).logits[:, 0]
    logprobs, states = evaluate(policy)
    values, ref_logprobs = critic(states)[..., 0], evaluate(reference)[0]
    response = attnshape.Response(response_mask, start=torch.full((B,), P))
    kl, centered = attnshape.KL(logprobs, ref_logprobs, coef=0.05), score - score.mean()
    out = attnshape.shape_rewards(centered, tap.take(), response, values=values, kl=kl)
    advantages = attnshape.whiten(out.advantages, response, moments=out.moments)

optimizer = torch.optim.Adam([*policy.parameters(), *critic.parameters()], lr=1e-3)
for epoch in range(4):
    new, states = evaluate(policy)
    ratio = torch.where(response_mask, new - logprobs, 0.0).exp()
    clipped = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    loss = (
        clipped[response_mask].mean()
        + 0.1 * (critic(states)[..., 0] - out.returns)[response_mask].square().mean()
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"epoch {epoch}: loss {loss.item():.3f}")
print({name: round(value.item(), 3) for name, value in out.metrics.items()})
