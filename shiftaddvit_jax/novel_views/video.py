"""Frames, written as a video or as pictures."""

import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image

from shiftaddvit_jax.files import check_parent, whole_file, whole_folder
from shiftaddvit_jax.optional import require

VIDEOS = (".mp4", ".gif")
FRAMES_PER_SECOND = 24


def check_output(path: str | Path) -> Path:
    """``path``, if frames can be written there: a name in .mp4 or .gif, or a folder that does not exist.

    Raises:
      ValueError: another ending, or something that is there already.
    """
    path = Path(path)
    if path.suffix and path.suffix.lower() not in VIDEOS:
        raise ValueError(f"{path} is no name for frames; expected one in .mp4 or .gif, or that of a folder")
    check_parent(path)
    if not path.suffix and path.exists():
        raise ValueError(f"{path} exists; choose another name for the folder of frames")
    if path.suffix.lower() == ".mp4":
        require("views", "writing videos")
    return path


def write_frames(
    frames: Iterable[Float[np.ndarray, "height width 3"]],
    path: str | Path,
    frames_per_second: int = FRAMES_PER_SECOND,
) -> None:
    """Frames, colours from 0 to 1, as an MP4 (H.264), a GIF, or a folder of PNGs; whole or not at all.

    An MP4's sides are even: an odd side loses its last pixel.

    Raises:
      ValueError: see `check_output`; or no frames.
    """
    path = check_output(path)
    pictures = (np.round(255 * np.clip(frame, 0, 1)).astype(np.uint8) for frame in frames)
    first = next(pictures, None)
    if first is None:
        raise ValueError("there are no frames to write")
    if not path.suffix:
        with whole_folder(path) as temporary:
            for number, picture in enumerate(itertools.chain([first], pictures)):
                Image.fromarray(picture).save(temporary / f"{number:04d}.png")
        return
    with whole_file(path) as temporary:
        if path.suffix.lower() == ".gif":
            head, *rest = map(Image.fromarray, (first, *pictures))
            duration = 1000 / frames_per_second
            head.save(temporary, format="GIF", save_all=True, append_images=rest, duration=duration, loop=0)
        else:
            _write_mp4(first, pictures, temporary, frames_per_second)


def _write_mp4(first, pictures, file, frames_per_second):
    import imageio_ffmpeg

    height, width = (side // 2 * 2 for side in first.shape[:2])
    writer = imageio_ffmpeg.write_frames(
        str(file), (width, height), fps=frames_per_second, macro_block_size=2, ffmpeg_log_level="error"
    )
    try:
        writer.send(None)
        for picture in itertools.chain([first], pictures):
            writer.send(np.ascontiguousarray(picture[:height, :width]))
    finally:
        writer.close()
