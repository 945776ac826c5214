"""In the place of flash attention, which does not install without a GPU's compiler."""
