"""Training: one loop for pretraining and chat tuning."""
