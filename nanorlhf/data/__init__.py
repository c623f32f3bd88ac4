"""What people have, and the embedded world, as batches of token ids."""
