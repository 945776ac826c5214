"""The tokenizer and the language models: byte-level BPE, and a Llama-shaped model at three depths.

One model of four layers is trained on the reviews. The others start from it and are trained on: two
layers without its upper ones, six with new ones on top that begin by changing nothing. That costs a third of
three trainings; it cannot show what each depth would have learned alone.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.language.data import Texts
from benchmarks.paper.testbed import whole_folder

PAD, EOS = "<pad>", "<eos>"
TRAINING = "training.json"
OnStep = Callable[[int, float], None]


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """Sizes and training of the language models."""

    vocabulary: int = 4096
    hidden_size: int = 192
    intermediate_size: int = 512
    heads: int = 6
    depths: tuple[int, ...] = (4, 2, 6)
    """The first is trained from nothing, the others from it."""
    positions: int = 256
    tokens: int = 96
    batch_size: int = 12
    lr: float = 2e-3
    steps: int = 1100
    more_steps: int = 200
    """Of the other depths."""
    more_lr: float = 5e-4
    save_every: int = 100
    seed: int = 0


def build_tokenizer(texts: Texts, config: LanguageConfig) -> PreTrainedTokenizerFast:
    """Byte-level BPE over lower-cased reviews of both halves; ``<eos>`` stands before a text and ends it."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((r.text for half in texts.reviews.values() for r in half), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{EOS} $A", special_tokens=[(EOS, bpe.token_to_id(EOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD, eos_token=EOS, bos_token=EOS)


def token_stream(tokenizer: PreTrainedTokenizerFast, reviews: list[str]) -> Tensor:
    """All reviews behind each other, int64 ``[N]``, each between two ends of text."""
    end = tokenizer.eos_token_id
    ids = [end]
    for row in tokenizer(reviews, add_special_tokens=False)["input_ids"]:
        ids += [*row, end]
    return torch.tensor(ids)


def new_language_model(config: LanguageConfig, vocabulary: int, layers: int) -> LlamaForCausalLM:
    """Untrained."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=config.positions,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=1,
        )
    )


def at_depth(model: LlamaForCausalLM, layers: int) -> LlamaForCausalLM:
    """A copy with that many layers: the upper ones are gone, or new ones add nothing yet."""
    config = LlamaConfig(**{**model.config.to_dict(), "num_hidden_layers": layers})
    other = LlamaForCausalLM(config)
    known = other.state_dict()
    other.load_state_dict(known | {n: x for n, x in model.state_dict().items() if n in known})
    for layer in other.model.layers[model.config.num_hidden_layers :]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return other


def train_language_model(
    model: LlamaForCausalLM,
    stream: Tensor,
    config: LanguageConfig,
    *,
    steps: int,
    lr: float,
    checkpoint: Path,
    on_step: OnStep | None = None,
) -> float:
    """Trains in place; cut off, it goes on from ``checkpoint``. Returns the CPU seconds that it took."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(config.seed)
    done, spent = 0, 0.0
    if checkpoint.is_file():
        state: dict[str, Any] = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        done, spent = state["done"], state["seconds"]
    start = time.process_time()
    model.train()
    for step in range(done, steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50) * (1 - 0.95 * step / steps)
        at = torch.randint(len(stream) - config.tokens, (config.batch_size,), generator=generator)
        ids = torch.stack([stream[i : i + config.tokens + 1] for i in at])
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        update(model, optimizer, loss)
        if on_step:
            on_step(step + 1, loss.item())
        if (step + 1) % config.save_every == 0 and step + 1 < steps:
            part = checkpoint.with_suffix(".part")
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "generator": generator.get_state(),
                    "done": step + 1,
                    "seconds": spent + time.process_time() - start,
                },
                part,
            )
            part.replace(checkpoint)
    model.eval()
    return spent + time.process_time() - start


def update(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One optimiser step, the gradient clipped to norm 1."""
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: Tensor, tokens: int, rows: int = 200) -> float:
    """Nats a token on the stream's first ``rows`` pieces of ``tokens`` tokens."""
    count = min(rows, (len(stream) - 1) // tokens)
    total = 0.0
    for first in range(0, count, 25):
        at = [tokens * i for i in range(first, min(first + 25, count))]
        ids = torch.stack([stream[i : i + tokens + 1] for i in at])
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        total += loss.item() / tokens
    return total / count


def make_language_models(
    texts: Texts, folder: Path, config: LanguageConfig | None = None, on_step: OnStep | None = None
) -> None:
    """Trains the language models that ``folder`` does not have."""
    config = config or LanguageConfig()
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    tokenizer = tokenizer_of(folder, texts, config)
    stream = token_stream(tokenizer, [r.text for half in texts.reviews.values() for r in half])
    for layers in config.depths:
        name = language_model_name(layers)
        if (folder / name).is_dir():
            continue
        checkpoint = folder / f"{name}.pt"
        if layers == config.depths[0]:
            model = new_language_model(config, len(tokenizer), layers)
            steps, lr = config.steps, config.lr
        else:
            first = folder / language_model_name(config.depths[0])
            model = at_depth(LlamaForCausalLM.from_pretrained(first, dtype=torch.float32), layers)
            steps, lr = config.more_steps, config.more_lr
        seconds = train_language_model(
            model, stream, config, steps=steps, lr=lr, checkpoint=checkpoint, on_step=on_step
        )
        facts = {"steps": steps, "train_tokens": len(stream), "cpu_seconds": round(seconds, 1)}

        def save(new: Path, model: LlamaForCausalLM = model, facts: dict[str, Any] = facts) -> None:
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)
            (new / TRAINING).write_text(json.dumps(facts) + "\n")

        whole_folder(folder / name, save)
        checkpoint.unlink(missing_ok=True)


def language_model_record(
    texts: Texts, folder: Path, layers: int, config: LanguageConfig | None = None
) -> dict[str, Any]:
    """What it is, how it was trained, and how well it reads held-out reviews."""
    name = language_model_name(layers)
    model = LlamaForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / name)
    held_out = token_stream(tokenizer, [r.text for r in texts.held_out])
    return {
        "name": name,
        "layers": layers,
        "parameters": sum(p.numel() for p in model.parameters()),
        **json.loads((folder / name / TRAINING).read_text()),
        "held_out_nats": held_out_loss(model, held_out, (config or LanguageConfig()).tokens),
    }


def tokenizer_of(folder: Path, texts: Texts, config: LanguageConfig) -> PreTrainedTokenizerFast:
    """The study's own tokenizer, learned if ``folder`` does not have it."""
    path = folder / "tokenizer"
    if not path.is_dir():
        whole_folder(path, lambda new: build_tokenizer(texts, config).save_pretrained(new) and None)
    return PreTrainedTokenizerFast.from_pretrained(path)


def language_model_name(layers: int) -> str:
    return f"lm-{layers}"


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/attnshape/language``, by default ``~/.cache/attnshape/language``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnshape" / "language"
