"""What all pictures share: colors, and how figures become files."""

import io
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from shiftaddvit_jax.files import check_parent, whole_file

# Okabe and Ito's palette, which the color-blind can tell apart too.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
EXPERT_COLORS = {"dense": COLORS[0], "shift": COLORS[1]}
FORMATS = (".png", ".svg")


def check_picture(path: str | Path) -> Path:
    """``path``, if a picture can be written there.

    Raises:
      ValueError: another ending than .png or .svg, or a folder that does not exist.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path} is no name for a picture; it must end in .png or .svg")
    check_parent(path)
    return path


def save_figure(figure: Figure, path: str | Path | None) -> Figure:
    """``figure``, written to ``path`` (a PNG or SVG) unless that is None.

    Raises:
      ValueError: see `check_picture`.
    """
    if path is not None:
        path = check_picture(path)
        with whole_file(path) as temporary:
            temporary.write_bytes(render_figure(figure, path.suffix[1:].lower()))
    return figure


def render_figure(figure: Figure, file_format: str) -> bytes:
    """``figure`` as a file of the format ``"png"`` or ``"svg"``."""
    data = io.BytesIO()
    # Otherwise Matplotlib blends translucent images in an SVG into other colors than in a PNG.
    with rc_context({"image.composite_image": False}):
        figure.savefig(data, format=file_format, dpi=120)
    return data.getvalue()
