"""A small base LM from nothing: tokenizer, pretraining exercises, optimizer."""
