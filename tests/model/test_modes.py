"""Every mode as parts: where what is known lies, that packs mix modes, and what comes back."""

from __future__ import annotations

import dataclasses
import doctest
import inspect
import re
import shlex
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import modes
from model.condition import GivenClip, clip_segment, rows_for
from model.config import DiTConfig
from model.dit import DiT
from model.generate import check, make_parser
from model.modes import Job
from model.sample import Request, Sampling, sample
from model.stack import Size, Stack
from model.text import Vocabulary
from model.vae import VideoVAE
from model.world import VOCABULARY
from sora_kernels.packing import Grid, PackedLayout

WORDS = Vocabulary(VOCABULARY)
PROMPT = "a red circle moving left"
SIZE = Size(24, 16, 9)
FEW = Sampling(steps=2, guidance=2.0)


@pytest.fixture(scope="module")
def stack() -> Stack:
    """Random weights that are not zero anywhere, so that everything given matters."""
    torch.manual_seed(0)
    dit = DiT(DiTConfig(16, 2, 2, patch=(1, 1, 1), rope_axes=(4, 2, 2), vocabulary=len(WORDS)))
    for parameter in dit.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return Stack(dit.eval(), VideoVAE().eval().requires_grad_(False), WORDS)


def clip(frames: int, seed: int = 0, height: int = 16, width: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(3, frames, height, width, generator=generator) * 2 - 1


def every_mode() -> dict[str, Job]:
    known = clip(9)
    return {
        "text": modes.text_to_video(PROMPT, SIZE, seed=1),
        "image of another size": modes.text_to_video("a green cross", Size(32, 16, 1), seed=2),
        "image to video": modes.image_to_video(PROMPT, SIZE, known[:, :1], seed=3),
        "forward": modes.extend(PROMPT, SIZE, known, seed=4),
        "backward": modes.extend(PROMPT, SIZE, known, "backward", context=5, seed=5),
        "connect": modes.connect(PROMPT, SIZE, known, clip(9, 1), seed=6),
        "fill": modes.fill(PROMPT, SIZE, {0: known[:, :1], 5: known[:, 5:6]}, seed=7),
        "super-resolve": modes.super_resolve(PROMPT, known[:, :3], 4, seed=8),
        "edit": modes.edit(PROMPT, known, 0.5, seed=9),
        "loop": modes.loop(PROMPT, dataclasses.replace(SIZE, frames=8), seed=10),
    }


def spans(job: Job) -> list[tuple[float, int]]:
    return [(part.time, part.video.shape[1]) for part in job.given]


def test_known_pixels_lie_at_their_times() -> None:
    known = clip(20)
    forward = modes.extend(PROMPT, SIZE, known)
    assert spans(forward) == [(-9, 9)]  # frames -9 to -1: the next one is frame 0
    assert torch.equal(forward.given[0].video, known[:, 11:])
    backward = modes.extend(PROMPT, SIZE, known, "backward", context=5)
    assert spans(backward) == [(9, 5)]  # frame 9 follows the 9 that are made
    assert torch.equal(backward.given[0].video, known[:, :5])
    assert spans(modes.connect(PROMPT, SIZE, known, clip(5), context=5)) == [(-5, 5), (9, 5)]
    assert spans(modes.image_to_video(PROMPT, SIZE, known[:, :1])) == [(0, 1)]
    finer = modes.super_resolve(PROMPT, known[:, :4], 3)
    assert spans(finer) == [(0, 1), (3, 1), (6, 1), (9, 1)] and finer.size.frames == 10
    longer = dataclasses.replace(SIZE, frames=7)  # the latents cover 9 frames, 7 are wanted
    assert spans(modes.extend(PROMPT, longer, known, "backward")) == [(7, 9)]


def test_a_pack_of_every_mode_equals_its_clips_alone(stack: Stack) -> None:
    """All modes and sizes in one pack. A clip depends on nothing that it shares the pack with."""
    jobs = every_mode()
    together = modes.run(stack, list(jobs.values()), FEW)
    for (name, job), packed in zip(jobs.items(), together, strict=True):
        assert packed.shape == (3, job.size.frames, job.size.height, job.size.width), name
        (alone,) = modes.run(stack, [job], FEW)
        torch.testing.assert_close(packed, alone, rtol=0, atol=2e-5, msg=name)
    assert modes.run(stack, [], FEW) == []


def test_everything_given_matters(stack: Stack) -> None:
    """Other pixels, or the same ones at another time, make another clip."""
    for name in ("image to video", "forward", "backward", "connect", "fill", "super-resolve"):
        job = every_mode()[name]
        for number, part in enumerate(job.given):
            (before,) = modes.run(stack, [job], FEW)
            for other in (
                dataclasses.replace(part, video=-part.video),
                dataclasses.replace(part, time=part.time + 0.5),
            ):
                given = [*job.given[:number], other, *job.given[number + 1 :]]
                changed = dataclasses.replace(job, given=tuple(given))
                (after,) = modes.run(stack, [changed], FEW)
                assert (after - before).abs().max() > 1e-3, name


def test_known_pixels_are_pasted_back(stack: Stack) -> None:
    for name, job in every_mode().items():
        (made,) = modes.run(stack, [job], FEW)
        pasted = modes.paste(job, made)
        known = {}
        for part in job.given:
            for k in range(part.video.shape[1]):
                if 0 <= part.time + k < job.size.frames:
                    known[int(part.time) + k] = part.video[:, k]
        assert len(known) == {"image to video": 1, "fill": 2, "super-resolve": 3}.get(name, 0)
        for k in range(made.shape[1]):
            assert torch.equal(pasted[:, k], known.get(k, made[:, k])), name
    between = Job(PROMPT, SIZE, (GivenClip(clip(1), 2.5),))
    assert torch.equal(modes.paste(between, made[:, :9]), made[:, :9])


def test_little_strength_gives_the_round_trip_of_the_source(stack: Stack) -> None:
    source = clip(7)  # 7 frames are padded to 9 and cropped back
    (trip,) = stack.decode(stack.encode([source]))
    (little,) = modes.run(stack, [modes.edit(PROMPT, source, 1e-6)], FEW)
    torch.testing.assert_close(little, trip[:, :7], rtol=0, atol=1e-3)
    (much,) = modes.run(stack, [modes.edit(PROMPT, source, 1.0)], FEW)
    (free,) = modes.run(stack, [modes.text_to_video(PROMPT, Size.of(source))], FEW)
    torch.testing.assert_close(much, free, rtol=0, atol=1e-4)
    assert (much - trip[:, :7]).abs().mean() > 0.01


def test_sizes_are_padded_and_cropped_back(stack: Stack) -> None:
    """An image whose sides the VAE does not divide: its last row and column are repeated."""
    size, image = Size(21, 18, 6), clip(1, height=18, width=21)
    assert size.latent == (3, 3, 3)
    (made,) = modes.run(stack, [modes.image_to_video(PROMPT, size, image)], FEW)
    assert made.shape == (3, 6, 18, 21)
    padded = torch.nn.functional.pad(image, (0, 3, 0, 6, 0, 0), mode="replicate")
    same = modes.image_to_video(PROMPT, Size(24, 24, 9), padded)
    (whole,) = modes.run(stack, [same], FEW)
    torch.testing.assert_close(made, whole[:, :6, :18, :21], rtol=0, atol=1e-5)


# --- loop ----------------------------------------------------------------------------------------


def test_a_loop_has_no_first_frame(stack: Stack) -> None:
    """Its copies stand where the circle says, and at every step they are the clip itself."""
    main = (3, 2, 3)
    segment = clip_segment(2, main, (1, 1, 1), loop=True)
    grids = [part for part in segment if isinstance(part, Grid)]
    times = [[part.origin[0] + i for i in range(part.t)] for part in grids]
    assert times == [[-1, 0], [3, 4], [0, 1, 2]]  # latent 2 is also at 0, latent 1 also at 3
    rows = rows_for(PackedLayout([segment]), torch.tensor([0.7]))
    assert rows.times.tolist() == pytest.approx([0, 0.7, 0.7, 0.7])
    seen: list[list[Tensor]] = []
    forward = stack.dit.forward

    def watch(latents: list[Tensor], *rest: object) -> list[Tensor]:
        seen.append(latents)
        return forward(latents, *rest)  # type: ignore[arg-type]

    stack.dit.forward = watch  # type: ignore[method-assign]
    try:
        request = Request([1, 2], main, loop=True)
        (made,) = sample(stack.dit, [request], Sampling(steps=3, guidance=1.0))
    finally:
        del stack.dit.forward
    assert made.shape[1:] == main and len(seen) == 3
    for before, behind, clip_itself in seen:
        assert torch.equal(before, clip_itself[:, 1:]) and torch.equal(behind, before)


def test_a_loop_is_decoded_with_the_frames_before_its_start(stack: Stack) -> None:
    """Turned by one latent, the circle decodes to the same frames, turned by four."""
    generator = torch.Generator().manual_seed(0)
    ring = torch.randn(16, 12, 2, 2, generator=generator)
    job = modes.loop(PROMPT, Size(16, 16, 48))

    def decoded(turn: int) -> Tensor:
        turned = ring.roll(-turn, 1)
        latent = torch.cat([torch.zeros(16, 1, 2, 2), turned], 1)  # any first latent
        return modes.cropped(stack.decode([modes.around(latent)])[0], job)

    straight, turned = decoded(0), decoded(1)
    assert straight.shape == (3, 48, 16, 16)
    torch.testing.assert_close(straight.roll(-4, 1), turned, rtol=0, atol=1e-4)


# --- chain ---------------------------------------------------------------------------------------


def test_a_chain_goes_on_from_its_last_frames(stack: Stack) -> None:
    size = Size(16, 16, 5)
    clips = list(modes.chain(stack, PROMPT, size, 3, context=5, sampling=FEW, seed=7))
    (first,) = modes.run(stack, [modes.text_to_video(PROMPT, size, 7)], FEW)
    assert torch.equal(clips[0], first)
    job = modes.extend(PROMPT, size, clips[1], context=5, seed=9)
    assert torch.equal(clips[2], modes.run(stack, [job], FEW)[0])
    start = clip(7, height=16, width=16)
    made = list(modes.chain(stack, PROMPT, size, 2, start, direction="backward", context=5,
                            sampling=FEW))  # fmt: skip
    job = modes.extend(PROMPT, size, torch.cat([made[0], start], 1), "backward", 5, seed=1)
    assert torch.equal(made[1], modes.run(stack, [job], FEW)[0])


def test_the_memory_of_a_chain_does_not_grow(stack: Stack) -> None:
    """What the generator holds between two clips is the context, however long it has run."""
    size, one = Size(16, 16, 5), Sampling(steps=1, guidance=1.0)
    link = modes.chain(stack, PROMPT, size, 12, context=5, sampling=one)
    assert isinstance(link, Generator)
    held = []
    for _ in range(12):
        next(link)
        state = inspect.getgeneratorlocals(link)
        held.append(sum(x.numel() for x in state.values() if isinstance(x, Tensor)))
    assert held[1:] == held[1:2] * 11 and held[-1] <= 2 * 3 * 5 * 16 * 16


# --- long clips ----------------------------------------------------------------------------------


def test_long_clips_get_more_frames_window_by_window() -> None:
    known = clip(12)
    jobs = modes.in_windows(PROMPT, known, 4)
    assert [job.size.frames for job in jobs] == [17, 17, 13]
    clips = [modes.paste(job, torch.zeros(3, job.size.frames, 16, 24)) for job in jobs]
    whole = modes.joined(clips)
    assert whole.shape[1] == 1 + 4 * 11 and torch.equal(whole[:, ::4], known)
    assert len(modes.in_windows(PROMPT, known[:, :3], 20)) == 2


def test_a_gap_sees_its_neighbours() -> None:
    known = clip(30)
    job, first = modes.fill_gap(PROMPT, known, 10, 14)
    assert first == 7 and job.size.frames == 10
    assert [part.time for part in job.given] == [0, 1, 2, 7, 8, 9]
    assert torch.equal(job.given[3].video, known[:, 14:15])
    at_end, first = modes.fill_gap(PROMPT, known, 28, 30)
    assert first == 25 and [part.time for part in at_end.given] == [0, 1, 2]
    for start, stop in ((0, 30), (5, 5), (20, 31), (-1, 3)):
        with pytest.raises(ValueError, match="start, stop: expected"):
            modes.fill_gap(PROMPT, known, start, stop)


# --- bad input -----------------------------------------------------------------------------------


def test_what_does_not_fit_is_named() -> None:
    known = clip(9)
    size = dataclasses.replace(SIZE, frames=6)
    cases = [
        (lambda: modes.extend(PROMPT, SIZE, clip(4), context=5), "at least 5 frames, got 4"),
        (lambda: modes.extend(PROMPT, SIZE, known, "sideways"), "direction: expected"),
        (lambda: modes.extend(PROMPT, SIZE, known, context=4), r"context: expected 1 \+ 4k"),
        (lambda: modes.connect(PROMPT, SIZE, known, clip(3)), "at least 9 frames, got 3"),
        (lambda: modes.fill(PROMPT, SIZE, {9: known[:, :1]}), r"frames 0 to 8, got \[9\]"),
        (lambda: modes.fill(PROMPT, SIZE, {-1: known[:, :1]}), r"got \[-1\]"),
        (lambda: modes.fill(PROMPT, SIZE, {}), "got none"),
        (lambda: modes.super_resolve(PROMPT, known, 1), "factor: expected"),
        (lambda: modes.super_resolve(PROMPT, known[:, :1], 2), "at least 2 frames"),
        (lambda: modes.edit(PROMPT, known, 0.0), r"strength: expected a number in \(0, 1\]"),
        (lambda: modes.edit(PROMPT, known, 1.1), r"strength: .*got 1.1"),
        (lambda: modes.loop(PROMPT, size), "loop: expected 4, 8, 12, ... frames, got 6"),
        (lambda: modes.image_to_video(PROMPT, SIZE, known), "one frame, got 9"),
        (lambda: modes.image_to_video(PROMPT, Size(16, 16, 9), known[:, :1]), "given: expected"),
        (lambda: Job(PROMPT, SIZE, (GivenClip(known[:, :3], 0),)), r"1 \+ 4k frames, got 3"),
        (lambda: GivenClip(known, float("inf")), "time: expected a finite"),
        (lambda: GivenClip(known, 0, -1.0), "step: expected a positive"),
        (lambda: GivenClip(known[0], 0), r"video: expected \[3, T, H, W\]"),
        (lambda: Job(PROMPT, SIZE, source=known[:, :5]), "source: expected"),
        (lambda: Job(PROMPT, Size(24, 16, 8), loop=True, source=clip(8)), "loop: expected nothing"),
        (lambda: Size(8, 32, 9), "width from 16"),
        (lambda: Size(32, 32, 0), "frames: expected 1"),
    ]  # fmt: skip
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()


# --- page ----------------------------------------------------------------------------------------


def test_the_page() -> None:
    """Every line of docs/modes.md runs, and every command on it is one."""
    page = Path(__file__).parents[2] / "docs" / "modes.md"
    result = doctest.testfile(str(page), module_relative=False, optionflags=doctest.FAIL_FAST)
    assert result.attempted > 8 and result.failed == 0
    commands = re.findall(r"^\|[^|]*\| `(-[^`]*)` \|", page.read_text(), flags=re.MULTILINE)
    assert len(commands) == 10
    for text in commands:
        args = make_parser().parse_args([PROMPT, "-o", "out.mp4", *shlex.split(text)])
        check(args)
