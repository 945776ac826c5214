"""From text to score and credit: reading, aligning, showing."""
