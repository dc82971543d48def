"""The record of a run: one JSON line a round always, and TensorBoard, MLflow or Weights & Biases."""

from fedtorch.tracking.base import Tracker, Tracking
from fedtorch.tracking.mlflow import MLflow
from fedtorch.tracking.record import Record
from fedtorch.tracking.tensorboard.events import TensorBoard
from fedtorch.tracking.wandb import WandB

__all__ = ["MLflow", "Record", "TensorBoard", "Tracker", "Tracking", "WandB"]
