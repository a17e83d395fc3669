"""Causal video VAE, 4x8x8 with 16 channels; an image is a one-frame video.

Layout inside: [B, T, H, W, C], so that the norm and the convolution over time are contiguous and
the convolution over space is channels-last. Convolutions are (2+1)D: 3x3 over space, then three
frames over time, causal. The norm is RMS over channels alone: no statistic mixes frames, which
is why streaming in chunks equals one shot.

Time: T = 1 + 4k frames <-> 1 + k latents. Latent 0 is frame 0 alone, latent j is frames 4j-3..4j
(and, causally, what came before). Before the first frame there is the first frame again, repeated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from model.config import VAEConfig, from_dict, to_dict
from model.files import (
    CheckpointError,
    check_finite,
    read_json,
    read_tensors,
    write_beside,
    write_json,
)
from sora_kernels import causal_conv_pad, norm_silu

TIME_STRIDE = 4
SPACE_STRIDE = 8

Cache = dict[nn.Module, Tensor]
"""Streaming state: the last input frames [B, C, 2, H, W] of each causal convolution, by module."""


def latent_shape(frames: int, height: int, width: int) -> tuple[int, int, int]:
    """(t, h, w) of the latent of a [T, H, W] video, padded as :meth:`VideoVAE.encode` does."""
    return (
        1 + -(-(frames - 1) // TIME_STRIDE),
        -(-height // SPACE_STRIDE),
        -(-width // SPACE_STRIDE),
    )


class NormSiLU(nn.Module):
    """silu(x / rms(x) * weight), rms over channels (the last dimension)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return norm_silu(x.movedim(-1, 1), self.weight, eps=1e-6).movedim(1, -1)


class SpaceConv(nn.Module):
    """3x3 convolution of every frame, zero padded: [B, T, H, W, C_in] -> [B, T, H, W, C_out]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1).permute(0, 3, 1, 2)
        return self.conv(flat).permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


class TimeConv(nn.Module):
    """Causal convolution over three frames, stride 1 or 2, as one matrix product.

    Output j reads the inputs stride*j - 2 .. stride*j, so T frames give 1 + (T - 1) // stride.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * inputs, outputs)
        self.stride = stride

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        past = cache.get(self) if cache is not None else None
        first = past is None
        inputs, kept = causal_conv_pad(
            x.movedim(-1, 1),
            past,
            pad_t=2,
            cache_len=0 if cache is None else 2,
            memory_format=torch.channels_last_3d,
        )
        padded = inputs.movedim(1, -1)
        if cache is not None:
            cache[self] = kept
        # A later chunk of an even length starts one frame after the last output's centre.
        begin = 0 if first else self.stride - 1
        taps = [
            padded[:, begin + tap : padded.shape[1] - 2 + tap : self.stride] for tap in range(3)
        ]
        return self.linear(torch.cat(taps, -1))


class Block(nn.Module):
    """x + time(norm_silu(space(norm_silu(x)))); the last layer starts at zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.space = NormSiLU(channels), SpaceConv(channels, channels)
        self.norm2, self.time = NormSiLU(channels), TimeConv(channels, channels)
        nn.init.zeros_(self.time.linear.weight)
        nn.init.zeros_(self.time.linear.bias)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        return x + self.time(self.norm2(self.space(self.norm1(x))), cache)


class Down(nn.Module):
    """Half the frame rate and, if ``space``, half the size."""

    def __init__(self, inputs: int, outputs: int, space: bool) -> None:
        super().__init__()
        self.factor = 2 if space else 1
        self.time = TimeConv(inputs * self.factor**2, outputs, stride=2)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        return self.time(space_to_depth(x, self.factor), cache)


class Up(nn.Module):
    """Twice the frame rate (T frames -> 2T - 1) and, if ``space``, twice the size."""

    def __init__(self, inputs: int, outputs: int, space: bool) -> None:
        super().__init__()
        self.factor = 2 if space else 1
        self.time = TimeConv(inputs, 2 * outputs * self.factor**2)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        first = cache is None or self.time not in cache
        y = self.time(x, cache)
        batch, frames, height, width, channels = y.shape
        y = y.view(batch, frames, height, width, 2, channels // 2).movedim(4, 2)
        y = y.reshape(batch, 2 * frames, height, width, channels // 2)
        return depth_to_space(y[:, 1:] if first else y, self.factor)


def space_to_depth(x: Tensor, factor: int) -> Tensor:
    """[B, T, H*f, W*f, C] -> [B, T, H, W, f*f*C]."""
    if factor == 1:
        return x
    batch, frames, height, width, channels = x.shape
    y = x.reshape(batch, frames, height // factor, factor, width // factor, factor, channels)
    return y.transpose(3, 4).flatten(4)


def depth_to_space(x: Tensor, factor: int) -> Tensor:
    """The inverse of :func:`space_to_depth`."""
    if factor == 1:
        return x
    batch, frames, height, width, channels = x.shape
    y = x.reshape(batch, frames, height, width, factor, factor, channels // factor**2)
    return y.transpose(3, 4).reshape(batch, frames, height * factor, width * factor, -1)


class Encoder(nn.Module):
    """[B, T, H, W, 3] -> [B, t, h, w, latent channels], not yet scaled."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        fine, coarse = config.widths
        self.patch = config.patch
        self.stem = SpaceConv(3 * config.patch**2, fine)
        self.blocks = nn.ModuleList(
            [
                *(Block(fine) for _ in range(config.encoder_blocks[0])),
                Down(fine, coarse, space=True),
                *(Block(coarse) for _ in range(config.encoder_blocks[1])),
                Down(coarse, coarse, space=False),
                *(Block(coarse) for _ in range(config.encoder_blocks[1])),
            ]
        )
        self.norm = NormSiLU(coarse)
        self.head = SpaceConv(coarse, config.latent_channels)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        h = self.stem(space_to_depth(x, self.patch))
        for block in self.blocks:
            h = block(h, cache)
        return self.head(self.norm(h))


class Decoder(nn.Module):
    """[B, t, h, w, latent channels] -> [B, T, H, W, 3]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        fine, coarse = config.widths
        self.patch = config.patch
        self.stem = SpaceConv(config.latent_channels, coarse)
        self.blocks = nn.ModuleList(
            [
                *(Block(coarse) for _ in range(config.decoder_blocks[1])),
                Up(coarse, coarse, space=False),
                *(Block(coarse) for _ in range(config.decoder_blocks[1])),
                Up(coarse, fine, space=True),
                *(Block(fine) for _ in range(config.decoder_blocks[0])),
            ]
        )
        self.norm = NormSiLU(fine)
        self.head = SpaceConv(fine, 3 * config.patch**2)

    def forward(self, z: Tensor, cache: Cache | None = None) -> Tensor:
        h = self.stem(z)
        for block in self.blocks:
            h = block(h, cache)
        return depth_to_space(self.head(self.norm(h)), self.patch)


class VideoVAE(nn.Module):
    """Encoder and decoder with one global latent scale.

    One scale, not one per channel: channels that the encoder hardly uses keep their small
    variance, so the generator's loss does not give them full weight.
    """

    def __init__(self, config: VAEConfig | None = None) -> None:
        super().__init__()
        config = VAEConfig() if config is None else config
        if config.patch * 2 != SPACE_STRIDE:
            raise ValueError(f"patch: expected {SPACE_STRIDE // 2}, got {config.patch}")
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.register_buffer("scale", torch.tensor(float(config.scale)))
        self.scale: Tensor

    def encode(self, video: Tensor) -> Tensor:
        """[B, 3, T, H, W] in [-1, 1] -> latent [B, C, t, h, w].

        T is padded to 1 + 4k by repeating the last frame, H and W to multiples of 8 by
        repeating the last row and column; hand the true (T, H, W) to :meth:`decode` to crop.
        """
        _check_video(video)
        return self._latent(self.encoder(_to_inside(pad_video(video))))

    def decode(self, latent: Tensor, size: tuple[int, int, int] | None = None) -> Tensor:
        """Latent [B, C, t, h, w] -> [B, 3, T, H, W], clamped to [-1, 1]; ``size`` crops."""
        self._check_latent(latent)
        video = self.decoder(_to_inside(latent) / self.scale).clamp(-1, 1)
        frames, height, width = (None, None, None) if size is None else size
        return _to_outside(video)[:, :, :frames, :height, :width]

    def encode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Encode a video that comes in chunks [B, 3, T_i, H, W] of any lengths.

        Yields latents as soon as their frames are there; together they equal :meth:`encode` of
        the whole video. Memory does not grow with the length of the video.
        """
        cache: Cache = {}
        waiting: Tensor | None = None
        for chunk in chunks:
            _check_video(chunk)
            waiting = chunk if waiting is None else torch.cat([waiting, chunk], 2)
            ready = _ready(waiting.shape[2], started=bool(cache))
            if ready:
                yield self._latent(
                    self.encoder(_to_inside(pad_space(waiting[:, :, :ready])), cache)
                )
                waiting = waiting[:, :, ready:]
        if waiting is not None and waiting.shape[2]:
            missing = TIME_STRIDE - waiting.shape[2]
            last = waiting[:, :, -1:].expand(-1, -1, missing, -1, -1)
            rest = pad_space(torch.cat([waiting, last], 2))
            yield self._latent(self.encoder(_to_inside(rest), cache))

    def decode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Decode latents that come in chunks [B, C, t_i, h, w]: the first chunk gives
        1 + 4 (t_i - 1) frames, later ones 4 t_i; together they equal :meth:`decode`."""
        cache: Cache = {}
        for chunk in chunks:
            self._check_latent(chunk)
            video = self.decoder(_to_inside(chunk) / self.scale, cache)
            yield _to_outside(video.clamp(-1, 1))

    def _latent(self, z: Tensor) -> Tensor:
        return _to_outside(z * self.scale)

    def _check_latent(self, latent: Tensor) -> None:
        channels = self.config.latent_channels
        if latent.dim() != 5 or latent.shape[1] != channels or not latent.is_floating_point():
            raise ValueError(
                f"latent: expected float [B, {channels}, t, h, w], "
                f"got {latent.dtype} {tuple(latent.shape)}"
            )


def _check_video(video: Tensor) -> None:
    if video.dim() != 5 or video.shape[1] != 3 or not video.is_floating_point():
        raise ValueError(
            f"video: expected float [B, 3, T, H, W], got {video.dtype} {tuple(video.shape)}"
        )
    if 0 in video.shape:
        raise ValueError(f"video: expected no empty dimension, got {tuple(video.shape)}")


def _ready(frames: int, started: bool) -> int:
    """How many of the waiting frames make whole latents."""
    if started:
        return frames // TIME_STRIDE * TIME_STRIDE
    return 1 + (frames - 1) // TIME_STRIDE * TIME_STRIDE if frames else 0


def pad_video(video: Tensor) -> Tensor:
    """[B, 3, T, H, W] -> the sizes the VAE works on: T = 1 + 4k, H and W multiples of 8."""
    missing = -(video.shape[2] - 1) % TIME_STRIDE
    if missing:
        video = torch.cat([video, video[:, :, -1:].expand(-1, -1, missing, -1, -1)], 2)
    return pad_space(video)


def pad_space(video: Tensor) -> Tensor:
    """Repeat the last row and column until H and W are multiples of 8."""
    down, right = -video.shape[3] % SPACE_STRIDE, -video.shape[4] % SPACE_STRIDE
    return F.pad(video, (0, right, 0, down, 0, 0), mode="replicate") if down or right else video


def _to_inside(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 4, 1).contiguous()


def _to_outside(x: Tensor) -> Tensor:
    return x.permute(0, 4, 1, 2, 3).contiguous()


def save_vae(vae: VideoVAE, folder: str | Path, name: str = "vae") -> Path:
    """Write ``name``.safetensors (fp16) and ``name``.json (config): both or none."""
    folder = Path(folder)
    config = to_dict(vae.config) | {"scale": float(vae.scale)}
    weights = {
        key: value.detach().to(torch.float16).contiguous()
        for key, value in vae.state_dict().items()
        if key != "scale"
    }
    path = folder / f"{name}.safetensors"

    def write(beside: Path) -> None:  # weights and their scale belong together: both or none
        save_file(weights, beside)
        write_json(folder / f"{name}.json", config)

    write_beside(path, write)
    return path


def load_vae(folder: str | Path, name: str = "vae", device: str | torch.device = "cpu") -> VideoVAE:
    """Load what :func:`save_vae` wrote, in fp32, in eval mode, without gradients."""
    folder = Path(folder)
    path, described = folder / f"{name}.safetensors", folder / f"{name}.json"
    for file in (path, described):
        if not file.is_file():
            raise ValueError(f"folder: expected a VAE checkpoint, {file} does not exist")
    config = read_json(described)
    try:
        vae = VideoVAE(from_dict(VAEConfig, config))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint: {described} describes no VAE: {error}") from error
    weights, _ = read_tensors(path)
    weights["scale"] = vae.scale
    try:
        vae.load_state_dict({key: value.float() for key, value in weights.items()})
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"checkpoint: {path} does not fit: {reason}") from error
    check_finite(vae, path)
    return vae.to(device).eval().requires_grad_(False)
