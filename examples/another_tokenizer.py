"""A reward model with another tokenizer and chat template: its credit is carried to the policy's tokens."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

import attnshape

# The policy writes pieces of words; the reward model reads whole words, in a template of its own.
MERGES = [("g", "o"), ("o", "d"), ("b", "a"), ("p", "l"), ("pl", "o"), ("plo", "t")]
LETTERS = [*"abdefghiklmnoprstuwy", "Ġ", *("".join(pair) for pair in MERGES)]
pieces = Tokenizer(models.BPE({text: i for i, text in enumerate(LETTERS)}, MERGES))
pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
pieces.decoder = decoders.ByteLevel()
policy_tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces)

WORDS = "<pad> <unk> [user] [assistant] how was it a good bad plot but the".split()
words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
reward_tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
TURN = "[{{ m['role'] }}] {{ m['content'] | trim }} "
reward_tokenizer.chat_template = f"{{% for m in messages %}}{TURN}{{% endfor %}}"

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
config = LlamaConfig(vocab_size=len(WORDS), pad_token_id=0, num_labels=1, initializer_range=0.3, **sizes)
reward_model = LlamaForSequenceClassification(config).eval()

# What the policy sampled, as ids; the conversation ends with its text.
responses = ["a good plot", "bad plot but good"]
response_ids = [policy_tokenizer(text)["input_ids"] for text in responses]
asked = {"role": "user", "content": "how was it"}
conversations = [[asked, {"role": "assistant", "content": text}] for text in responses]
width = max(map(len, response_ids))
response_mask = torch.tensor([[j < len(ids) for j in range(width)] for ids in response_ids])

alignment = attnshape.align_texts(reward_tokenizer, conversations, policy_tokenizer, response_ids)
with torch.no_grad(), attnshape.AttentionTap(reward_model) as tap:
    score = reward_model(alignment.input_ids, attention_mask=alignment.attention_mask).logits[:, 0]
on_words = attnshape.Response(alignment.source_mask, start=torch.zeros(2, dtype=torch.int32))
credit = alignment(attnshape.attention_credit(tap.take(), on_words))  # [B, R], on the policy's tokens
out = attnshape.shape_rewards(score, credit, response_mask)
torch.testing.assert_close(out.rewards.sum(1), score)

for ids, row, total in zip(response_ids, out.rewards, score, strict=True):
    tokens = zip(map(policy_tokenizer.decode, ids), row.tolist(), strict=False)
    print(f"score {total.item():+.2f}:", *(f"{text!r} {reward:+.2f}" for text, reward in tokens))
