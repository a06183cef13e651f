"""What a model and a context take of a machine, foreseen from shapes: bytes, and seconds from the
rates that `wavekv.machine` measured. Nothing is loaded and nothing is run."""

from wavekv.estimate.model import ModelShape, read_model
from wavekv.estimate.plan import Estimate, estimate

__all__ = ["Estimate", "ModelShape", "estimate", "read_model"]
