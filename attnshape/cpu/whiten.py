"""Moments of unmasked tokens, and whitening by them."""
