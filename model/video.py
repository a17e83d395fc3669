"""Video files in and out, through PyAV; pictures through Pillow.

Files are written beside their target and renamed, so a reader never meets half a file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor


class VideoError(ValueError):
    """A file that is not a readable video, or a tensor that cannot become one."""


def to_uint8(video: Tensor) -> np.ndarray:
    """float [3, T, H, W] in [-1, 1] -> uint8 [T, H, W, 3]; values outside are clamped."""
    if video.dim() != 4 or video.shape[0] != 3 or 0 in video.shape:
        raise VideoError(f"video: expected [3, T, H, W], got {tuple(video.shape)}")
    if not bool(torch.isfinite(video).all()):
        raise VideoError("video: expected finite values")
    scaled = ((video.detach().float().clamp(-1, 1) + 1) * 127.5).round()
    return scaled.to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()


def from_uint8(frames: np.ndarray) -> Tensor:
    """uint8 [T, H, W, 3] -> float32 [3, T, H, W] in [-1, 1]."""
    return torch.from_numpy(frames.copy()).permute(3, 0, 1, 2).float() / 127.5 - 1


def read_frames(path: str | Path) -> Iterator[Tensor]:
    """The frames of a video or picture one by one, float32 [3, H, W] in [-1, 1].

    Raises VideoError for a missing, unreadable, truncated or audio-only file.
    """
    path = Path(path)
    if not path.is_file():
        raise VideoError(f"{path}: no such file")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoError(f"{path}: has no video stream")
            for frame in container.decode(container.streams.video[0]):
                yield from_uint8(frame.to_ndarray(format="rgb24")[None])[:, 0]
    except (av.error.FFmpegError, EOFError) as error:
        raise VideoError(f"{path}: not a readable video ({error})") from error


def read_video(path: str | Path, max_frames: int | None = None) -> tuple[Tensor, float]:
    """(float32 [3, T, H, W] in [-1, 1], frames per second).

    Raises VideoError as :func:`read_frames` does, and for a file with no frame, with fewer frames
    than its header promises (truncated), or whose frames change size. 24 frames per second are
    assumed where the file does not say.
    """
    if max_frames is not None and max_frames < 1:
        raise VideoError(f"max_frames: expected at least 1, got {max_frames}")
    frames: list[Tensor] = []
    for frame in read_frames(path):
        if frames and frame.shape != frames[0].shape:
            raise VideoError(
                f"{path}: frame {len(frames)} is {tuple(frame.shape[1:])}, "
                f"the first is {tuple(frames[0].shape[1:])}"
            )
        frames.append(frame)
        if len(frames) == max_frames:
            break
    if not frames:
        raise VideoError(f"{path}: holds no frame")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        promised, rate = stream.frames, stream.average_rate
    if promised > len(frames) and len(frames) != max_frames:
        raise VideoError(f"{path}: truncated, {len(frames)} of {promised} frames can be read")
    return torch.stack(frames, 1), float(rate) if rate else 24.0


def write_video(path: str | Path, video: Tensor, fps: float = 8.0, scale: int = 1) -> Path:
    """Write float [3, T, H, W] in [-1, 1] as one video: see :func:`write_clips`."""
    return write_clips(path, [video], fps, scale)


def write_clips(
    path: str | Path, clips: Iterable[Tensor], fps: float = 8.0, scale: int = 1
) -> Path:
    """Write clips, float [3, T, H, W] in [-1, 1], one after another as one video.

    H.264 in MP4, 4:2:0, visually lossless (CRF 12). ``scale`` enlarges every pixel to scale x
    scale. 4:2:0 needs even sizes: an odd H or W gets its last row or column repeated once.
    A clip is taken when the one before it is encoded, so memory holds one of them at a time.

    Raises VideoError for arguments that are wrong, and for clips that are none, not finite or of
    different sizes; then, and whatever ``clips`` raises, ``path`` is left as it was.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise VideoError(f"path: expected a name that ends in .mp4, got {path.name}")
    if not fps > 0 or not math.isfinite(fps):
        raise VideoError(f"fps: expected a positive number, got {fps}")
    if scale < 1:
        raise VideoError(f"scale: expected at least 1, got {scale}")
    part = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with av.open(str(part), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.pix_fmt, stream.options = "yuv420p", {"crf": "12", "preset": "medium"}
            size: tuple[int, ...] | None = None
            for clip in clips:
                if size is None:
                    size = clip.shape[2:]
                    stream.height, stream.width = _even(scale * size[0]), _even(scale * size[1])
                elif clip.shape[2:] != size:
                    raise VideoError(f"clips: expected one size, got {size} and {clip.shape[2:]}")
                for frame in _enlarged(to_uint8(clip), scale):
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            if size is None:
                raise VideoError("clips: expected at least one")
            container.mux(stream.encode())
        os.replace(part, path)
    except av.error.FFmpegError as error:
        raise VideoError(f"{path}: cannot be written ({error})") from error
    finally:
        part.unlink(missing_ok=True)
    return path


def _even(length: int) -> int:
    return length + length % 2


def _enlarged(frames: np.ndarray, scale: int) -> Iterator[np.ndarray]:
    """The frames [H, W, 3] of [T, H, W, 3] enlarged, with even sizes, one by one."""
    for frame in frames:
        large = frame.repeat(scale, axis=0).repeat(scale, axis=1)
        height, width = large.shape[:2]
        yield np.pad(large, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def read_image(path: str | Path) -> Tensor:
    """A picture as a one-frame video, float32 [3, 1, H, W] in [-1, 1]."""
    path = Path(path)
    if not path.is_file():
        raise VideoError(f"{path}: no such file")
    try:
        with Image.open(path) as picture:
            return from_uint8(np.asarray(picture.convert("RGB"))[None])
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise VideoError(f"{path}: not a readable picture ({error})") from error


def write_image(path: str | Path, image: Tensor, scale: int = 1) -> Path:
    """Write the first frame of [3, T, H, W] as PNG."""
    return _save_png(path, to_uint8(image[:, :1])[0], scale)


def contact_sheet(
    path: str | Path, videos: list[Tensor], scale: int = 3, max_frames: int | None = None
) -> Path:
    """Write a PNG with one row of frames per video; sizes may differ."""
    if not videos:
        raise VideoError("videos: expected at least one")
    rows = [to_uint8(video if max_frames is None else video[:, :max_frames]) for video in videos]
    height = sum(row.shape[1] + 2 for row in rows) + 2
    width = max(len(row) * (row.shape[2] + 2) for row in rows) + 2
    sheet = np.full((height, width, 3), 110, dtype=np.uint8)
    top = 2
    for row in rows:
        for number, frame in enumerate(row):
            left = 2 + number * (row.shape[2] + 2)
            sheet[top : top + row.shape[1], left : left + row.shape[2]] = frame
        top += row.shape[1] + 2
    return _save_png(path, sheet, scale)


def _save_png(path: str | Path, pixels: np.ndarray, scale: int) -> Path:
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    if scale < 1:
        raise VideoError(f"scale: expected at least 1, got {scale}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.repeat(scale, axis=0).repeat(scale, axis=1)).save(part, format="PNG")
        os.replace(part, path)
    except OSError as error:
        raise VideoError(f"{path}: cannot be written ({error})") from error
    finally:
        part.unlink(missing_ok=True)
    return path
