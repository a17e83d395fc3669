"""Sampling and one training step on clips of different sizes: ours packed, and every plain way.

The plain ways are the ones in use: one padded batch, buckets of equal size, clip by clip, and
packed tokens with attention per segment. The fastest of them is also reported as ``plain``, and
it is the one that ``compile`` compiles: a claim against the slowest would be no claim.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from time import perf_counter

import torch
from torch import Tensor

from model.condition import clip_segment
from model.config import DiTConfig
from model.dit import DiT
from model.flow import euler_step, euler_times, size_shift
from model.sample import Request, Sampling, sample, start_noise
from sora_kernels.packing import PackedLayout

from .block import WAN, block_flops
from .plain_dit import Clip, PlainDiT, parameters_of, waste
from .registry import DTYPES, Case, Context, Inputs, Provider, Run

# DiT-S with fewer blocks, so that a round of all providers fits a CPU.
CONFIG = DiTConfig(width=384, depth=4, heads=6, vocabulary=64)
WORDS = 8
# Latents (T, H, W) and how many of each: images, short clips, longer and larger ones. 62% padding.
MIX = {(1, 16, 16): 4, (3, 16, 16): 4, (5, 16, 16): 2, (5, 16, 32): 2}
# On a GPU: four blocks of Wan 1.3B's widths; images and clips of 512 x 512, one clip of 480p.
CUDA = replace(WAN, depth=4, patch=(1, 2, 2), vocabulary=64)
CUDA_MIX = {(1, 64, 64): 4, (5, 64, 64): 2, (9, 60, 104): 2}

Way = Callable[[Sequence[Tensor], Tensor], list[Tensor]]


def inputs(
    config: DiTConfig, latents: Sequence[tuple[int, int, int]], steps: int, dtype: str,
    device: torch.device,
) -> Inputs:  # fmt: skip
    """A model with weights of ``dtype``; the latents and the state of the sampler are fp32."""
    generator = torch.Generator().manual_seed(0)
    model = DiT(config)
    for p in model.parameters():  # adaLN-Zero starts as the identity, which no trained model is
        torch.nn.init.normal_(p, std=0.02 if p.dim() > 1 else 0.1, generator=generator)
    words = torch.randint(1, config.vocabulary, (len(latents), WORDS), generator=generator)
    starts = [start_noise(config.channels, latent, i) for i, latent in enumerate(latents)]
    return {
        "model": model.to(device, DTYPES[dtype]),
        "words": words.to(device),
        "latents": latents,
        "steps": steps,
        "x": [x.to(device) for x in starts],
        "target": [torch.randn(x.shape, generator=generator).to(device) for x in starts],
        "times": torch.rand(len(latents), generator=generator).to(device),
    }


def plain_model(given: Inputs, model: DiT, *, compile: bool = False) -> PlainDiT:
    clips = [Clip(w, x) for w, x in zip(given["words"], given["x"], strict=True)]
    return PlainDiT(model, clips, compile=compile)


def schedule(given: Inputs) -> Tensor:
    """Times ``[steps + 1, clips]``, as `model.sample.sample` chooses them."""
    columns = []
    for t, h, w in given["latents"]:
        tokens = t * h * w // 4
        shift = size_shift(tokens, given["model"].config.base_tokens, Sampling().shift)
        columns.append(euler_times(given["steps"], shift))
    return torch.stack(columns, dim=1)


def sampling_ours(given: Inputs) -> Run:
    requests = [
        Request(words.tolist(), latent, seed=i)
        for i, (words, latent) in enumerate(zip(given["words"], given["latents"], strict=True))
    ]
    options = Sampling(steps=given["steps"], guidance=1.0, shift=Sampling().shift)
    return lambda: sample(given["model"], requests, options)


def sampling_plain(way: Way, given: Inputs) -> Run:
    """The same walk from the same noise."""
    times = schedule(given)

    def run() -> list[Tensor]:
        x = [
            start_noise(x.shape[0], latent, i).to(given["times"].device)
            for i, (x, latent) in enumerate(zip(given["x"], given["latents"], strict=True))
        ]
        with torch.no_grad():
            for now, then in zip(times[:-1], times[1:], strict=True):
                v = way(x, now.float().to(given["times"].device))
                steps = zip(x, v, now.tolist(), then.tolist(), strict=True)
                x = [euler_step(xi, vi, a, b) for xi, vi, a, b in steps]
        return x

    return run


def training(model: DiT, velocity: Way, given: Inputs) -> Run:
    """Loss, gradients, AdamW. Every provider trains its own copy of the model."""
    weights = parameters_of(model)
    # A step too small to change anything that is compared, but not skipped.
    optimiser = torch.optim.AdamW(weights, lr=1e-9, fused=True)
    values = sum(target.numel() for target in given["target"])

    def run() -> list[Tensor]:
        optimiser.zero_grad(set_to_none=True)
        predicted = velocity(given["x"], given["times"])
        errors = [
            (v - wanted).square().sum()
            for v, wanted in zip(predicted, given["target"], strict=True)
        ]
        loss = torch.stack(errors).sum() / values
        loss.backward()
        optimiser.step()
        return [loss.detach(), *(p.grad for p in weights if p.grad is not None)]

    return run


def training_ours(given: Inputs) -> Run:
    model = copy.deepcopy(given["model"])
    words, patch = given["words"].flatten(), model.config.patch

    def velocity(x: Sequence[Tensor], times: Tensor) -> list[Tensor]:
        # A new batch has new sizes: the layout is part of the step.
        segments = [clip_segment(WORDS, latent, patch) for latent in given["latents"]]
        layout = PackedLayout(segments, patch=patch, device=times.device)
        return model(x, layout, words, times)

    return training(model, velocity, given)


def plain_provider(way: str, mode: str) -> Provider:
    def build(given: Inputs) -> Run:
        if mode == "fwd":
            return sampling_plain(plain_model(given, given["model"]).ways()[way], given)
        model = copy.deepcopy(given["model"])
        return training(model, plain_model(given, model).ways()[way], given)

    return build


def compile_provider(ways: Sequence[str], mode: str) -> Provider:
    """torch.compile of the block, in the way that is fastest without it."""

    def build(given: Inputs) -> Run:
        costs = {}
        for way in ways:
            run = plain_provider(way, mode)(given)
            run()
            start = perf_counter()
            run()
            if given["times"].is_cuda:
                torch.cuda.synchronize()
            costs[way] = perf_counter() - start
        best = min(costs, key=lambda way: costs[way])
        model = given["model"] if mode == "fwd" else copy.deepcopy(given["model"])
        velocity = plain_model(given, model, compile=True).ways()[best]
        return (
            sampling_plain(velocity, given) if mode == "fwd" else training(model, velocity, given)
        )

    return build


def cases(context: Context) -> Iterable[Case]:
    on_cuda = context.device == "cuda"
    config, mix = (CUDA, CUDA_MIX) if on_cuda else (CONFIG, MIX)
    share = 2 if context.quick else 1
    latents = [latent for latent, count in mix.items() for _ in range(count // share)]
    lengths = [WORDS + t * h * w // 4 for t, h, w in latents]
    ways = ("plain_padded", "plain_bucketed", "plain_loop", "plain_packed")
    with torch.device("meta"):
        weights = sum(p.numel() for p in DiT(config).parameters())
    dtypes = ("bf16",) if on_cuda else ("fp32", "bf16")
    hidden = int(config.width * config.mlp_ratio)
    flops = config.depth * block_flops(lengths, config.width, hidden)
    # Every Euler step is the same work again: two of them stand for as many as one likes.
    steps = 1 if context.quick else 2
    jobs = (("sampling", "fwd", steps), ("training_step", "fwd+bwd", 3))
    for dtype, (op, mode, factor) in product(dtypes, jobs):
        own: Provider = sampling_ours if mode == "fwd" else training_ours
        providers: dict[str, Provider] = {"sora_kernels": own}
        providers |= {way: plain_provider(way, mode) for way in ways}
        providers["compile"] = compile_provider(ways, mode)
        tokens, padding = sum(lengths), waste(lengths)
        yield Case(
            suite="e2e",
            op=op,
            mode=mode,
            case=f"{len(latents)} clips, {tokens} tokens, {100 * padding:.0f}% padding waste",
            dtype=dtype,
            bytes=factor * weights * DTYPES[dtype].itemsize,
            flops=factor * flops,
            inputs=partial(inputs, config, latents, steps, dtype),
            providers=providers,
            plain_variants=ways,
            units={"clips": len(latents)},
            extra={"padding_waste": padding, "tokens": tokens, "blocks": config.depth},
        )
