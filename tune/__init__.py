"""Hyperparameter search over fine-tuning, on Ray Tune."""
