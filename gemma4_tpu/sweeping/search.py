"""Search by Optuna."""
