"""The credit travels with the score: one process has the reward model, another shapes."""

import torch
import torch.multiprocessing as mp
from transformers import LlamaConfig, LlamaForSequenceClassification

import attnshape

B, S, R = 4, 16, 10


def reward_worker(batches: mp.Queue, results: mp.Queue) -> None:
    """Scores and credits ``(input_ids, attention_mask, response_mask, response_start)`` until None comes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=100, pad_token_id=0, num_labels=1, **sizes)
    model = LlamaForSequenceClassification(config).eval()
    with torch.no_grad(), attnshape.AttentionTap(model) as tap:
        while (batch := batches.get()) is not None:
            ids, mask, response_mask, start = (torch.tensor(x) for x in batch)
            score = model(ids, attention_mask=mask).logits[:, 0]
            credit = attnshape.attention_credit(tap.take(), attnshape.Response(response_mask, start=start))
            results.put((score.tolist(), credit.tolist()))  # [B] and [B, R]: all that has to travel


def main() -> None:
    context = mp.get_context("spawn")
    batches, results = context.Queue(), context.Queue()
    worker = context.Process(target=reward_worker, args=(batches, results), daemon=True)
    worker.start()
    torch.manual_seed(1)
    ids = torch.randint(1, 100, (B, S))
    response_mask = torch.ones(B, R, dtype=torch.long)
    response_mask[0, 7:] = 0
    attention_mask = torch.cat([torch.ones(B, S - R, dtype=torch.long), response_mask], 1)
    ids = ids * attention_mask
    batches.put([x.tolist() for x in (ids, attention_mask, response_mask, torch.full((B,), S - R))])
    score, credit = (torch.tensor(x) for x in results.get(timeout=120))
    batches.put(None)
    worker.join()
    # In the trainer: no reward model, no tap, a critic's values.
    out = attnshape.shape_rewards(score, credit, response_mask, values=torch.zeros(B, R))
    torch.testing.assert_close(out.rewards.sum(1), score)
    print("score      ", [round(x, 4) for x in score.tolist()])
    print("first row's", [round(x, 4) for x in out.rewards[0].tolist()])


if __name__ == "__main__":
    main()
