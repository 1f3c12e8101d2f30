"""Training: the Lightning module, its trainer, losses, prompts and optimizer."""
