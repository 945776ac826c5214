"""TRL's GRPOTrainer with a reward model's credit: each completion's advantage is spread over its tokens.

Needs: pip install trl
"""

import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForSequenceClassification
from transformers import PreTrainedTokenizerFast as Fast
from trl import GRPOConfig

from attnshape import CreditModel
from attnshape.integrations.trl import GRPOTrainer  # in the place of: from trl import GRPOTrainer

torch.manual_seed(0)
letters = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
by_letter = Tokenizer(models.BPE({text: i for i, text in enumerate(letters)}, []))
by_letter.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
by_letter.decoder = decoders.ByteLevel()
tokenizer = Fast(tokenizer_object=by_letter, pad_token="<pad>", eos_token="<eos>")
special = {"vocab_size": len(letters), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}


def rule(completions: list[str], **_: object) -> list[float]:
    """A rule's reward has no credit: its part of the advantage stays even over the tokens."""
    return [min(len(text), 8) / 8 for text in completions]


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    reward_model = LlamaForSequenceClassification(
        LlamaConfig(num_labels=1, initializer_range=0.3, **sizes, **special)
    )
    reward_model.save_pretrained(folder / "reward")
    tokenizer.save_pretrained(folder / "reward")
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=128, **special)).save_pretrained(
        folder / "policy"
    )
    settings = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 12}
    trainer = GRPOTrainer(
        str(folder / "policy"),
        reward_funcs=[str(folder / "reward"), rule],
        args=GRPOConfig(
            str(folder / "out"), max_steps=3, report_to=[], use_cpu=True, logging_steps=1, **settings
        ),
        train_dataset=Dataset.from_dict({"prompt": ["was it good? ", "the plot "] * 8}),
        processing_class=tokenizer,
        credit=CreditModel(str(folder / "reward")),
        dense_share=0.8,
    )
    trainer.train()
for line in trainer.state.log_history[:-1]:  # the last is of the whole run
    print({key: line[key] for key in ("reward", "credit/entropy", "credit/response_attention")})
