"""What is made small (losses) and what is told to people (metrics): outputs and targets in, sums and counts out."""

from fromzero.objectives.losses import LOSSES, Loss, bce, cross_entropy, huber, mae, mse, predicted_start
from fromzero.objectives.metrics import Metrics

__all__ = ["LOSSES", "Loss", "Metrics", "bce", "cross_entropy", "huber", "mae", "mse", "predicted_start"]
