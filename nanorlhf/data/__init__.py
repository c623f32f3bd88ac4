"""From the files that people have, or from the embedded world, to batches of token ids."""
