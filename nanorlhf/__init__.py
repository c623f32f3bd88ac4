"""nanorlhf: pretrain, fine-tune, learn a reward from human feedback, and optimise it with PPO."""
