"""ITP-R, the policy that learns how far to look ahead: pseudo-labels, warm-up, online A2C."""
