"""Pure strings: states, prompts, actions.  No torch, no engine."""
