"""What is asked of a checkpoint: scenes, prompts, known frames, jobs; and the floors beside them.

A suite is a row of the evaluation. Its items are deterministic in (suite, seed, index) and their
list has a hash. An item knows the true clip, which of its frames are given and which are made; so
every clip to be judged, a floor's, too, is the whole clip with frames put in.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from model import modes
from model.grammar import COLOURS, HELD_OUT, Wanted, parse
from model.modes import Job
from model.stack import Size
from model.vae import VideoVAE
from model.world import Scene, captions, render, sample_scene

SUITES_VERSION = 1
"""Changes with every change of what a suite asks."""
EDIT_STRENGTH = 0.8
ONE = 1 / (4 * 6 * 8)


@dataclass(frozen=True)
class Suite:
    """One row. size: (height, width).

    frames: of the whole clip. known: the frames of it that are given. made: its frames from-to
    that are generated, all without.
    chance: rate of ``all`` for a clip that shows one object and moves in the world's words,
    drawn evenly, and knows what is given.
    share: the row has 1/share of the clips of the others (for slow rows).
    """

    name: str
    mode: str
    kind: str | None
    size: tuple[int, int]
    frames: int
    chance: float
    known: tuple[int, ...] = ()
    made: tuple[int, int] | None = None
    held_out: bool = False
    detailed: bool = False
    headline: bool = False
    share: int = 1

    @property
    def span(self) -> tuple[int, int]:
        """Frames from-to that are generated."""
        return self.made or (0, self.frames)

    @property
    def seams(self) -> tuple[int, ...]:
        """First frames after a border between known and generated frames."""
        return tuple(at for at in self.span if 0 < at < self.frames)

    @property
    def unknown(self) -> tuple[int, ...]:
        """Frames nothing of which is given."""
        return tuple(frame for frame in range(self.frames) if frame not in self.known)


def _text(
    name: str, kind: str | None, height: int, width: int, frames: int = 9, **more: object
) -> Suite:
    chance = {"image": 1 / 24, "still": ONE * 8 / 9}.get(kind or "", ONE)
    options = {"chance": chance, **more}
    return Suite(name, "text_to_video", kind, (height, width), frames, **options)  # type: ignore[arg-type]


CONTEXT = 5
SUITES: tuple[Suite, ...] = (
    _text("one_object", "one", 32, 32, headline=True),
    _text("held_out", None, 32, 32, held_out=True, headline=True),
    _text("one_object_detailed", "one", 32, 32, detailed=True, chance=ONE / 4),
    _text("size_9:16", "one", 56, 32),
    _text("size_2:3", "one", 48, 32),
    _text("size_3:2", "one", 32, 48),
    _text("size_16:9", "one", 32, 56),
    _text("size_2:1", "one", 32, 64),
    _text("size_48x48", "one", 48, 48),
    _text("frames_17", "one", 32, 32, 17),
    _text("image", "image", 32, 32, 1),
    _text("still", "still", 32, 32),
    # One frame tells no speed: the detailed prompt does.
    Suite("image_to_video", "image_to_video", "one", (32, 32), 9, 1 / 16, (0,), detailed=True),
    Suite("extend_forward", "extend", "one", (32, 48), 14, 1 / 16, (0, 1, 2, 3, 4), (5, 14)),
    Suite("extend_backward", "extend", "one", (32, 48), 14, 1 / 16, (9, 10, 11, 12, 13), (0, 9)),
    Suite("connect", "connect", "one", (32, 48), 15, 1 / 16, (0, 1, 2, 3, 4, 10, 11, 12, 13, 14),
          (5, 10)),
    Suite("fill", "fill", "one", (32, 32), 9, 1 / 16, (0, 3, 8)),
    Suite("super_resolution", "super_resolve", "one", (32, 32), 9, 1 / 16, (0, 4, 8)),
    Suite("edit_colour", "edit", "one", (32, 32), 9, ONE),
    Suite("loop", "loop", "one", (32, 32), 16, 1 / 24),
    _text("bounce", "bounce", 32, 32, 13),
    _text("two_objects", "two", 32, 48, chance=2 * ONE**2),
    _text("occlusion", "occlude", 48, 48, chance=2 * ONE**2, share=2),
    _text("collision", "collide", 48, 48, chance=2 * ONE**2, share=2),
)  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One thing asked for: the scene that a right answer shows, and its rendering."""

    suite: Suite
    scene: Scene
    prompt: str
    video: Tensor
    source: Tensor | None = None  # the clip to edit
    floor_scene: Scene | None = None  # right attributes, but it ignores the source, or the loop

    @property
    def wanted(self) -> tuple[Wanted, ...]:
        """What the answer must show: what the prompt says and what the given frames tell."""
        told = bool(self.suite.known) or self.source is not None
        return parse(captions(self.scene)[1] if told else self.prompt)

    def whole(self, made: Tensor) -> Tensor:
        """The whole clip with the generated frames in their place."""
        clip = self.video.clone()
        clip[:, slice(*self.suite.span)] = made
        return clip


def items_of(suite: Suite, count: int, seed: int) -> list[Item]:
    """The items of a suite. None has been seen in training: its random numbers come from
    streams of their own."""
    return [_item(suite, seed, index) for index in range(count)]


def _item(suite: Suite, seed: int, index: int) -> Item:
    rng = np.random.default_rng([seed, 11, zlib.crc32(suite.name.encode()), index])

    def draw(frames: int = suite.frames, wanted: Wanted | None = None) -> Scene:
        return sample_scene(
            rng, kind=suite.kind, size=suite.size, frames=frames, held_out=suite.held_out,
            wanted=wanted,
        )  # fmt: skip

    if suite.mode == "loop":
        scene = there_and_back(draw(frames=suite.frames // 2 + 1))
        item = scene.objects[0]
        prompt = f"a {item.colour} {item.shape} bouncing off the wall"
        wanted = Wanted(item.shape, item.colour)
        return Item(suite, scene, prompt, render(scene), floor_scene=draw(wanted=wanted))
    scene = draw()
    prompt = captions(scene)[int(suite.detailed)]
    if suite.mode != "edit":
        return Item(suite, scene, prompt, render(scene))
    old = scene.objects[0]
    allowed = [
        c for c in COLOURS if c != old.colour and (old.shape, c, old.direction) not in HELD_OUT
    ]
    new = replace(old, colour=str(rng.choice(allowed)))
    edited = replace(scene, objects=(new,))
    other = draw(wanted=Wanted(new.shape, new.colour, new.direction, new.size, new.speed))
    return Item(suite, edited, captions(edited)[0], render(edited), render(scene), other)


def there_and_back(scene: Scene) -> Scene:
    """A seamless loop of 2 (T - 1) frames: there and back again, begun in the middle of the way.

    With T = 9 its turns are at frames 4 and 12, the ends of latents, which the VAE can follow.
    """
    count = scene.frames
    order = [*range(count), *range(count - 2, 0, -1)]
    order = order[count // 2 :] + order[: count // 2]
    objects = tuple(
        replace(
            item,
            path=tuple(item.path[k] for k in order),
            headings=tuple(item.headings[k] for k in order),
        )
        for item in scene.objects
    )
    return replace(scene, frames=len(order), objects=objects)


def scenes_hash(items: list[Item]) -> str:
    """sha256 over scenes and prompts, lengths rounded to a millionth of a pixel."""
    digest = hashlib.sha256()
    for item in items:
        text = json.dumps([asdict(item.scene), item.prompt], default=str)
        rounded = json.loads(text, parse_float=lambda number: round(float(number), 6))
        digest.update(json.dumps(rounded).encode())
    return digest.hexdigest()


def job_of(item: Item, seed: int) -> Job:
    """The job that asks for the generated frames of an item."""
    suite, video, prompt = item.suite, item.video, item.prompt
    begin, end = suite.span
    size = Size(video.shape[3], video.shape[2], end - begin)
    frames = {k: video[:, k : k + 1] for k in suite.known}
    if suite.mode == "text_to_video":
        return modes.text_to_video(prompt, size, seed)
    if suite.mode == "image_to_video":
        return modes.image_to_video(prompt, size, video[:, :1], seed)
    if suite.mode == "extend" and begin > 0:
        return modes.extend(prompt, size, video[:, :begin], "forward", begin, seed)
    if suite.mode == "extend":
        return modes.extend(prompt, size, video[:, end:], "backward", suite.frames - end, seed)
    if suite.mode == "connect":
        return modes.connect(prompt, size, video[:, :begin], video[:, end:], begin, seed)
    if suite.mode == "fill":
        return modes.fill(prompt, size, frames, seed)
    if suite.mode == "super_resolve":
        step = suite.known[1]
        return modes.super_resolve(prompt, video[:, ::step], step, seed)
    if suite.mode == "edit":
        assert item.source is not None
        return modes.edit(prompt, item.source, EDIT_STRENGTH, seed)
    if suite.mode == "loop":
        return modes.loop(prompt, size, seed)
    raise ValueError(f"mode: expected the name of a job, got {suite.mode!r}")


# --- ceilings and floors ---------------------------------------------------------------------


@torch.no_grad()
def round_trip(vae: VideoVAE, item: Item) -> Tensor:
    """The best that a generator of latents can do: the true frames through the VAE."""
    true = item.video[:, slice(*item.suite.span)]
    _, frames, height, width = true.shape
    if item.suite.mode == "loop":  # as a loop is made: its first frame at both ends
        true = torch.cat([true, true[:, :1]], 1)
    latent = vae.encode(true[None].to(vae.scale.device))
    return item.whole(vae.decode(latent, (frames, height, width))[0].cpu())


def floors_of(item: Item) -> dict[str, Tensor]:
    """Tricks that know more than a generator does (true frames), and must not pass.

    repeat: the nearest known frame is held; without one, the true first frame.
    crossfade: linear interpolation between the known frames, where need be to the true ends.
    """
    suite, video = item.suite, item.video
    if suite.frames == 1:
        return {}
    if suite.mode == "edit":
        assert item.source is not None and item.floor_scene is not None
        return {"source": item.source, "unrelated": render(item.floor_scene)}
    known = sorted({*suite.known} or {0})
    ends = sorted({*suite.known, 0, suite.frames - 1})
    floors = {"repeat": item.whole(hold(video, known)[:, slice(*suite.span)])}
    floors["crossfade"] = item.whole(blend(video, ends)[:, slice(*suite.span)])
    if suite.mode == "loop":
        assert item.floor_scene is not None
        floors["one_way"] = one_way = render(item.floor_scene)
        weight = torch.tensor([0.25, 0.5, 0.75])[:, None, None]
        faded = one_way[:, -3:] * (1 - weight) + one_way[:, :1] * weight
        floors["crossfade"] = torch.cat([one_way[:, :-3], faded], 1)
    return floors


def hold(video: Tensor, known: list[int]) -> Tensor:
    """Every frame is the latest known one; before the first, the first."""
    latest = [
        max([k for k in known if k <= frame], default=known[0]) for frame in range(video.shape[1])
    ]
    return video[:, latest]


def blend(video: Tensor, known: list[int]) -> Tensor:
    """Linear interpolation in time between known frames that include the first and the last."""
    times = np.arange(video.shape[1])
    right = np.clip(np.searchsorted(known, times), 1, len(known) - 1)
    low, high = np.array(known)[right - 1], np.array(known)[right]
    weight = torch.tensor((times - low) / (high - low), dtype=video.dtype)[:, None, None]
    return video[:, low] * (1 - weight) + video[:, high] * weight
