"""Video files: round trip, odd sizes, pictures, and every kind of bad file."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch

from model.video import (
    VideoError,
    contact_sheet,
    read_frames,
    read_image,
    read_video,
    write_image,
    write_video,
)
from model.world import clip


def smooth_clip(frames: int, height: int, width: int) -> torch.Tensor:
    y = torch.linspace(-1, 1, height)[None, :, None]
    x = torch.linspace(-1, 1, width)[None, None, :]
    t = torch.linspace(0, 1, frames)[:, None, None]
    wave = torch.sin(2 * (x + y) + 3 * t)
    return torch.stack([wave, 0.5 * wave, -wave]) * 0.8


def error_db(made: torch.Tensor, true: torch.Tensor) -> float:
    return 10 * float(torch.log10(4 / (made - true).square().mean()))


def test_round_trip_keeps_frames_rate_and_pixels(tmp_path: Path) -> None:
    video = smooth_clip(9, 64, 48)
    path = write_video(tmp_path / "a.mp4", video, fps=12)
    back, rate = read_video(path)
    assert back.shape == video.shape and rate == 12
    assert error_db(back, video) > 34
    assert [item.name for item in tmp_path.iterdir()] == ["a.mp4"]  # nothing left beside it


def test_odd_sizes_repeat_the_last_row_and_column(tmp_path: Path) -> None:
    video = smooth_clip(5, 33, 47)
    back, _ = read_video(write_video(tmp_path / "odd.mp4", video))
    assert back.shape == (3, 5, 34, 48)
    assert error_db(back[:, :, :33, :47], video) > 30
    assert error_db(back[:, :, 33, :47], video[:, :, 32]) > 26


def test_scale_enlarges_pixels(tmp_path: Path) -> None:
    back, _ = read_video(write_video(tmp_path / "big.mp4", clip(0).video, scale=4))
    assert back.shape[2:] == tuple(4 * n for n in clip(0).video.shape[2:])


def test_a_picture_is_a_one_frame_video(tmp_path: Path) -> None:
    video = smooth_clip(1, 21, 30)
    back = read_image(write_image(tmp_path / "a.png", video))
    assert back.shape == (3, 1, 21, 30)
    assert float((back - video).abs().max()) <= 1 / 127


def test_contact_sheet_holds_every_frame(tmp_path: Path) -> None:
    sheet = read_image(
        contact_sheet(tmp_path / "s.png", [smooth_clip(3, 16, 16), smooth_clip(2, 24, 16)], scale=2)
    )
    assert sheet.shape == (3, 1, 2 * (16 + 24 + 6), 2 * (3 * 18 + 2))


def test_streaming_reader_equals_the_whole(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", smooth_clip(5, 16, 16))
    assert torch.equal(torch.stack(list(read_frames(path)), 1), read_video(path)[0])


def audio_only(path: Path) -> Path:
    with av.open(str(path), "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono"
        )
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("kind", ["missing", "text", "empty", "audio", "cut", "folder"])
def test_bad_files_raise_a_clear_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bad.mp4"
    if kind == "text":
        path.write_text("not a video" * 50)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "audio":
        audio_only(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "cut":
        whole = write_video(tmp_path / "whole.mp4", smooth_clip(9, 64, 64)).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VideoError, match=r"bad\.mp4"):
        read_video(path)


def test_a_video_cut_inside_its_frames_is_truncated(tmp_path: Path) -> None:
    """The header survives (moved to the front), the pictures do not."""
    noise = torch.rand(3, 33, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = write_video(tmp_path / "whole.mp4", noise)
    front = tmp_path / "front.mp4"
    with (
        av.open(str(whole)) as source,
        av.open(str(front), "w", format="mp4", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    data = front.read_bytes()
    front.write_bytes(data[: int(len(data) * 0.6)])
    with pytest.raises(VideoError, match="front.mp4"):
        read_video(front)


@pytest.mark.parametrize(
    ("video", "keywords"),
    [
        (torch.zeros(4, 2, 8, 8), {}),
        (torch.zeros(3, 0, 8, 8), {}),
        (torch.full((3, 1, 8, 8), float("nan")), {}),
        (torch.zeros(3, 1, 8, 8), {"fps": 0}),
        (torch.zeros(3, 1, 8, 8), {"scale": 0}),
    ],
)
def test_bad_tensors_and_arguments_raise(
    tmp_path: Path, video: torch.Tensor, keywords: dict[str, int]
) -> None:
    with pytest.raises(VideoError):
        write_video(tmp_path / "x.mp4", video, **keywords)
    assert not list(tmp_path.iterdir())


def test_wrong_suffix_raises(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="mp4"):
        write_video(tmp_path / "x.avi", smooth_clip(1, 8, 8))
