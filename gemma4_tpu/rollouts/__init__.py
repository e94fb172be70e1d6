"""On-policy learning: what is sampled, how it is rewarded, and the batch that comes of it."""
