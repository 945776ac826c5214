"""Adapters to PPO frameworks, one module each; importing one imports no framework."""
