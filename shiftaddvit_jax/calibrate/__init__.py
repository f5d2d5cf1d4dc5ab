"""A shift model without training: weights fitted to what a dense model does on some images.

`fit` has the algebra of one layer, `branch` what a block's layers take and put out, `routing` a mixture's
router, `convert` the pass through a model, and `choice` what each layer becomes under a budget.
"""

from shiftaddvit_jax.calibrate.convert import CalibratedLayer, calibrate, calibrate_with_report
from shiftaddvit_jax.calibrate.fit import Moments, compensated_rounding, fit_layer

__all__ = [
    "CalibratedLayer",
    "Moments",
    "calibrate",
    "calibrate_with_report",
    "compensated_rounding",
    "fit_layer",
]
