"""Training: the fine-tuning core, the base policy, the three stages of ITP-R, and a base LM from nothing."""
