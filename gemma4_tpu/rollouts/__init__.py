"""On-policy learning: draws samples, rewards them, and builds the batch that is trained on."""
