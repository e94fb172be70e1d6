"""GRPO and expert iteration of the tiny model, beside supervised tuning with as much compute."""
