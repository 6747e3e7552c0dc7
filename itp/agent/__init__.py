"""What an agent is made of: the policy π_θ, the world model M_φ, and imagination with both."""
