"""The record of a run: one JSON line a round always, and TensorBoard, MLflow or Weights & Biases."""

from typing import TYPE_CHECKING

from fedtorch.lazy import offers

if TYPE_CHECKING:
    from fedtorch.tracking.base import Tracker, Tracking
    from fedtorch.tracking.mlflow import MLflow
    from fedtorch.tracking.record import Record
    from fedtorch.tracking.tensorboard.choice import TensorBoard
    from fedtorch.tracking.wandb import WandB
else:
    __getattr__, __dir__ = offers(__name__, __file__)

__all__ = ["MLflow", "Record", "TensorBoard", "Tracker", "Tracking", "WandB"]
