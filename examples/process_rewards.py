"""Rewards of tokens, segments and turns beside the score of the whole: PPO, and groups without a critic."""

import torch
from transformers import LlamaConfig, LlamaForTokenClassification

import attnshape
from attnshape import KL, GroupConfig, ShapingConfig, credit

torch.manual_seed(0)
B, R = 4, 12  # completions of one prompt, and tokens of each
ids = torch.randint(0, 50, (B, R))
mask = torch.ones(B, R)
mask[:, 5:7] = 0  # what a tool answered is not the policy's
score = torch.tensor([1.0, -0.5, 0.25, 0.0])  # a verifier of the whole: centred by the group, or by you

# A process reward model says of each token whether it is good: TLCR's token rewards.
sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
judge = LlamaForTokenClassification(LlamaConfig(vocab_size=50, num_labels=2, **sizes)).eval()
with torch.no_grad():
    good = judge(ids).logits.softmax(-1)[..., 1]
of_tokens = credit.discriminator_rewards(good, mask)

# A reward model of segments, read where a token was hard to guess (Yin et al. 2025).
token_scores, entropy = torch.randn(B, R), torch.rand(B, R)
of_segments = credit.segment_rewards(token_scores, entropy, mask, cutoff=0.8)

# A score after each turn: what a turn added goes to its last token, before the tool speaks, and at the end.
of_turns = torch.zeros(B, R)
of_turns[:, 4] = torch.tensor([0.5, 0.0, 0.5, 0.0])  # the first turn's test passed, or not
of_turns[:, R - 1] = score - of_turns[:, 4]

# PPO: dense rewards are added as they are. What replaces the score stands beside a score of zero.
kl, values = KL.given(torch.zeros(B, R), 0.05), torch.zeros(B, R)
out = attnshape.shape_rewards(torch.zeros(B), "sparse", mask, values=values, kl=kl, token_rewards=of_turns)
torch.testing.assert_close(out.rewards.sum(1), score)  # the turns' rewards add up to the whole
dense = 0.1 * of_tokens + 0.1 * of_segments
beside = attnshape.shape_rewards(score, "sparse", mask, token_rewards=dense, config=ShapingConfig(gamma=0.99))

# GRPO: signed weights move advantage between a completion's tokens and keep its mean.
group = GroupConfig.grpo(signed="score", dense_share=0.5)
shaped = attnshape.group_advantages(score, of_tokens, mask, group=B, config=group)
torch.testing.assert_close(shaped.advantages.sum(1) / mask.sum(1), shaped.completion)

for name, x in (
    ("turns", out.advantages),
    ("tokens and segments", beside.advantages),
    ("GRPO", shaped.advantages),
):
    print(f"{name:20}", " ".join(f"{a:+.2f}" for a in x[0].tolist()))
