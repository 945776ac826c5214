"""A miniature RLHF run: corpus, models, PPO with sparse and attention-based credit, pictures."""
