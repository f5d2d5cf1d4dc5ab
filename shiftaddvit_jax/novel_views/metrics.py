"""How near a rendered view is to the photograph."""

import numpy as np
from jaxtyping import Float

from shiftaddvit_jax.novel_views.perceptual import Lpips
from shiftaddvit_jax.optional import require

View = Float[np.ndarray, "height width 3"]


def peak_signal_to_noise(rendered: View, true: View) -> float:
    """PSNR in dB of colours from 0 to 1: -10 log10 of the mean squared error; infinite for equal views."""
    error = float(np.mean(np.square(rendered.astype(np.float64) - true)))
    return float("inf") if error == 0 else -10 * float(np.log10(error))


def score_view(rendered: View, true: View, lpips: Lpips | None = None) -> dict[str, float]:
    """``psnr`` (dB), ``ssim`` (1 for equal views), ``flip`` and, where it is given, ``lpips`` (0 for equal).

    SSIM is scikit-image's with Gaussian windows of deviation 1.5 (Wang et al., 2004); FLIP its authors' mean
    over the view, at 67 pixels a degree (Andersson et al., 2020).

    Raises:
      MissingExtra: the extra ``views`` is not installed.
      ValueError: views of different shapes, or less than 11 pixels high or wide.
    """
    require("views", "scoring views")
    import flip_evaluator
    from skimage.metrics import structural_similarity

    if rendered.shape != true.shape or min(true.shape[:2]) < 11:
        raise ValueError(
            "views must have one shape and sides of at least 11 pixels, got "
            f"{rendered.shape} and {true.shape}"
        )
    similarity = structural_similarity(
        true,
        rendered,
        channel_axis=2,
        data_range=1.0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    _, flip, _ = flip_evaluator.evaluate(
        np.ascontiguousarray(true, np.float32), np.ascontiguousarray(rendered, np.float32), "LDR"
    )
    scores = {"psnr": peak_signal_to_noise(rendered, true), "ssim": float(similarity), "flip": float(flip)}
    return scores if lpips is None else {**scores, "lpips": lpips(rendered, true)}
