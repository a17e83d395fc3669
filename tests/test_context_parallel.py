"""Context parallelism: several gloo processes against one, forward and backward.

One set of four processes runs every case: worlds of four use all of them, worlds of two and three
use subgroups (importing PyTorch is what takes time here). The processes write what they computed,
the tests read it.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sora_kernels import backend
from sora_kernels.context_parallel import ring_attention, ulysses_attention
from sora_kernels.ops.packed_attention import packed_attention
from sora_kernels.packing import Grid, PackedLayout, Text
from tests.helpers import check, randn

PROCESSES = 4
ATTENTION = {"ulysses": ulysses_attention, "ring": ring_attention}
GROUPS = {4: [0, 1, 2, 3], 3: [1, 2, 3], 2: [2, 3]}
PLAIN = {"fp64": "reference", "fp32": "native"}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}

PACKS = {
    "one-segment": [73],  # every rank meets every other
    "long-between-short": [5, 0, 48, 1, 0, 17, 2],  # spans 3 of 4 slices
    "cut-twice": [20, 0, 31, 22, 0],
    "uncut": [10, 8, 0, 9, 9],  # in 4 slices of 9 one segment is cut, in 2 none
    "fewer-tokens-than-ranks": [0, 2, 1],
    "cpu-flash": [150, 0, 160],  # keys beyond what the CPU backward widens to fp32
}


@dataclass(frozen=True)
class Case:
    pack: str
    world: int
    kind: str
    heads: tuple[int, int] = (4, 4)
    causal: bool = False
    dtype: str = "fp32"
    chosen: str = "native"
    window: tuple[int, int, int] | None = None
    mixed: bool = False  # some ranks use only out, the others only lse

    @property
    def name(self) -> str:
        heads, heads_k = self.heads
        causal = "causal" if self.causal else "full"
        return (
            f"{self.kind}-{self.world}-{self.pack}-h{heads}k{heads_k}-{causal}-{self.dtype}-"
            f"{self.chosen}{'-mixed' * self.mixed}{'-window' * (self.window is not None)}"
        )


def cases() -> list[Case]:
    made: list[Case] = []
    for kind, world, pack in itertools.product(ATTENTION, (2, 4), PACKS):
        made.append(Case(pack, world, kind, (4, 2), True))
        if pack != "fewer-tokens-than-ranks":
            made.append(Case(pack, world, kind, (4, 4), False, "bf16"))
    for kind, world in itertools.product(ATTENTION, (2, 4)):
        made.append(Case("one-segment", world, kind, (4, 1), False))
        made.append(Case("long-between-short", world, kind, (4, 1), True, "fp64", "reference"))
        made.append(Case("cut-twice", world, kind, (4, 4), False, "fp64", "reference"))
        made.append(Case("fewer-tokens-than-ranks", world, kind, dtype="fp64", chosen="reference"))
        made.append(Case("long-between-short", world, kind, (8, 4), True, "bf16"))
    for kind, causal in itertools.product(ATTENTION, (False, True)):
        made.append(Case("one-segment", 3, kind, (6, 3), causal))
        made.append(Case("cut-twice", 2, kind, (4, 2), causal, "bf16", "reference"))
        made.append(Case("one-segment", 4, kind, (4, 2), causal, mixed=True))
    for world, (dtype, chosen) in itertools.product((2, 4), PLAIN.items()):
        case = Case("tiles", world, "ulysses", (4, 2), False, dtype, chosen, (1, 3, 1))
        made.append(case)
    # The interpreter is slow, and Ulysses calls nothing but the public function.
    made.append(Case("long-between-short", 2, "ring", (2, 1), True, "fp32", "triton"))
    return made


CASES = {case.name: case for case in cases()}


def layout_of(case: Case) -> PackedLayout:
    if case.window is None:
        return PackedLayout([[Text(n)] for n in PACKS[case.pack]], device="cpu")
    segments = [[Text(5), Grid(2, 8, 6)], [Grid(1, 4, 8)], [Text(3)]]
    return PackedLayout(segments, order="tile", tile=(1, 2, 2), device="cpu")


def options(case: Case) -> dict[str, Any]:
    made: dict[str, Any] = {"causal": case.causal, "return_lse": True}
    return made if case.window is None else {**made, "window": case.window}


def inputs(case: Case) -> list[Tensor]:
    """q, k, v and the upstream gradients of out and lse^T, for the whole pack."""
    n, (heads, heads_k), dim = layout_of(case).num_tokens, case.heads, 16
    dtype = DTYPES[case.dtype]
    packed = randn(n, heads + 2 * heads_k, dim, dtype=dtype)
    dout = randn(n, heads, dim, dtype=dtype, seed=1)
    dlse = randn(n, heads, dtype=torch.promote_types(dtype, torch.float32), seed=2)
    if case.mixed:
        for rank in range(case.world):
            unused = dlse if uses_out(rank) else dout
            layout_of(case).shard(rank, case.world).take(unused).zero_()
    return [*packed.split([heads, heads_k, heads_k], 1), dout, dlse]


def uses_out(rank: int) -> bool:
    return rank % 2 == 0


def results(attention: Any, tensors: list[Tensor], needs: str = "qkv", uses: str = "ol") -> Any:
    """out, lse^T, dq, dk, dv (tokens first, None where not asked for), of a loss that reads out
    ("o"), lse ("l") or both.
    """
    leaves = [
        x.detach().requires_grad_(name in needs) for name, x in zip("qkv", tensors[:3], strict=True)
    ]
    out, lse = attention(*leaves)
    pairs = {"o": (out, tensors[3]), "l": (lse, tensors[4].mT)}
    torch.autograd.backward(*zip(*(pairs[x] for x in uses), strict=True))
    return [out.detach(), lse.detach().mT, *(x.grad for x in leaves)]


# --- what the processes do ----------------------------------------------------------------------


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES,
        timeout=timedelta(seconds=120),
    )  # fmt: skip
    groups = {world: dist.new_group(ranks) for world, ranks in GROUPS.items()}
    done: dict[str, Any] = {}
    for name, case in CASES.items():
        if rank in GROUPS[case.world]:
            done[name] = run(case, groups[case.world])
    if rank in GROUPS[2]:
        done["messages"] = messages(groups[2])
    torch.save(done, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run(case: Case, group: dist.ProcessGroup) -> tuple[list[Tensor], list[str]]:
    """This rank's results, and what went wrong on the side."""
    rank = dist.get_rank(group)
    shard = layout_of(case).shard(rank, case.world)
    mine = [shard.take(x) for x in inputs(case)]
    uses = ("o" if uses_out(rank) else "l") if case.mixed else "ol"
    wrong: list[str] = []

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return ATTENTION[case.kind](q, k, v, shard, group=group, **options(case))

    with backend.use_backend(case.chosen):
        first = results(attention, mine, uses=uses)
        if case.chosen == "triton":  # the interpreter is slow
            return first, wrong
        if not all(map(torch.equal, first, results(attention, mine, uses=uses))):
            wrong.append("two runs differ")
        if case.heads != (4, 1):
            return first, wrong
        for needs in ("q", "v", "qk"):
            some = results(attention, mine, needs, uses)
            for name, all_grads, grad in zip("qkv", first[2:], some[2:], strict=True):
                if (grad is not None) != (name in needs):
                    wrong.append(f"d{name} although only {needs} require grad: {grad is not None}")
                elif grad is not None and not torch.equal(grad, all_grads):
                    wrong.append(f"d{name} differs if only {needs} require grad")
        with torch.no_grad():
            if not torch.equal(attention(*mine[:3])[0], first[0]):
                wrong.append("out differs without grad")
    return first, wrong


def messages(group: dist.ProcessGroup) -> list[str]:
    """What bad calls in a world of two raise; nothing may be sent before the check."""
    rank = dist.get_rank(group)
    layout = PackedLayout([[Text(6)]], device="cpu")
    shard = layout.shard(rank, 2)
    x = torch.zeros(3, 6, 8)
    calls = [
        lambda: ring_attention(x, x, x, layout.shard(1 - rank, 2), group=group),
        lambda: ring_attention(x[:2], x[:2], x[:2], layout.shard(0, 3), group=group),
        lambda: ring_attention(x[:2], x, x, shard, group=group),
        lambda: ulysses_attention(x, x[:2], x[:2], shard, group=group),
        lambda: ring_attention(x, x, x, layout, group=group),
        lambda: ulysses_attention(x[:, :3], x[:, :3], x[:, :3], shard, group=group),
        lambda: ulysses_attention(x, x[:, :3], x[:, :3], shard, group=group),
        lambda: ring_attention(x, x, x, shard, group=group, softmax_scale=-1.0),
        lambda: ring_attention(x.to("meta"), x.to("meta"), x.to("meta"), shard, group=group),
    ]
    raised: list[str] = []
    for call in calls:
        try:
            call()
            raised.append("nothing")
        except (TypeError, ValueError) as error:
            raised.append(f"{type(error).__name__}: {error}")
    return raised


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    # One server imports PyTorch, once, and every process is a fork of it.
    torch.multiprocessing.set_forkserver_preload([__name__])
    torch.multiprocessing.start_processes(
        work, (str(folder),), nprocs=PROCESSES, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


# --- the tests ----------------------------------------------------------------------------------


@functools.cache
def one_process(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """Results of the whole pack by the reference, in fp64 and in the dtype of the case."""
    layout, tensors = layout_of(case), inputs(case)

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Any:
        with backend.use_backend("reference"):
            return packed_attention(q, k, v, layout, **options(case))

    return results(reference, [x.double() for x in tensors]), results(reference, tensors)


@pytest.mark.parametrize("name", CASES)
def test_ranks_together_equal_one_process(name: str, done: list[dict[str, Any]]) -> None:
    case = CASES[name]
    parts = [done[rank][name] for rank in GROUPS[case.world]]
    # Kind and backend do not matter to one process, nor does the world where all gradients count.
    exact, lowp = one_process(
        replace(case, kind="", chosen="", world=case.world if case.mixed else 0)
    )
    together = [torch.cat(rows) for rows in zip(*(part for part, _ in parts), strict=True)]
    for label, got, want, low in zip(
        ("out", "lse", "dq", "dk", "dv"), together, exact, lowp, strict=True
    ):
        assert got.dtype == low.dtype, label
        slack = 0.0
        if label == "lse" and case.dtype == "bf16" and case.chosen == "native":
            slack = 128.0  # PyTorch's half-precision CPU kernel has an exponential of 20 bits
        if case.dtype == "fp64":
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        else:
            check(got, want, low, grad=label.startswith("d"), extra_ulp=slack, name=label)
    assert [wrong for _, wrong in parts] == [[]] * case.world


def test_bad_input_is_named(done: list[dict[str, Any]]) -> None:
    for rank, process in enumerate(GROUPS[2]):
        assert done[process]["messages"] == [
            f"ValueError: shard: expected rank {rank} of 2, as in the group, got rank {1 - rank} "
            "of 2",
            f"ValueError: shard: expected rank {rank} of 2, as in the group, got rank 0 of 3",
            "ValueError: q: expected the 3 tokens of the shard, got 2",
            "ValueError: k: expected the 3 tokens of the shard, got 2",
            "TypeError: shard: expected layout.shard(rank, world), got PackedLayout",
            "ValueError: q: expected a number of heads divisible by world (2), got 3",
            "ValueError: k: expected a number of heads that divides world (2) or is divisible by "
            "it, got 3",
            "ValueError: softmax_scale: expected a finite number >= 0, got -1.0",
            "ValueError: shard: expected a layout on the device of q, meta, got cpu",
        ]


def test_one_rank_needs_no_process_group() -> None:
    layout = PackedLayout([[Text(5)], [Text(4)]], device="cpu")
    q, k, v = randn(9, 3, 2, 8).unbind(1)
    want = packed_attention(q, k, v, layout, causal=True)
    shard = layout.shard(0, 1)
    assert torch.equal(ring_attention(q, k, v, shard, causal=True), want)
    assert torch.equal(ulysses_attention(q, k, v, shard, causal=True, max_seqlen=None), want)
    with pytest.raises(ValueError, match="group: expected torch.distributed to be initialized"):
        ring_attention(q[:4], k[:4], v[:4], layout.shard(0, 2))


# --- the plan -----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=8), st.integers(2, 6), st.booleans())
def test_a_plan_meets_every_pair_once(lengths: list[int], world: int, causal: bool) -> None:
    layout = PackedLayout([[Text(n)] for n in lengths], device="cpu")
    shards = [layout.shard(rank, world) for rank in range(world)]
    plans = [shard.ring_plan(causal) for shard in shards]
    segment = layout.segment_of_token
    want = (segment[:, None] == segment[None, :]).int()
    if causal:
        want = want.tril()
    seen = torch.zeros_like(want)
    for shard, plan in zip(shards, plans, strict=True):
        assert plan.steps == plans[0].steps
        assert all(plan.own.lengths)
        assert plan.own.cu_seqlens.tolist() == [0, *itertools.accumulate(plan.own.lengths)]
        at = shard.start
        for length in plan.own.lengths:
            block = torch.ones(length, length, dtype=torch.int32)
            seen[at : at + length, at : at + length] += block.tril() if causal else block
            at += length
        assert at == shard.stop
        for step, visit in plan.visits.items():
            owner = shards[shard.rank - step]
            sent = plans[owner.rank].sends[step]
            assert visit.keys.lengths == [sent.stop - sent.start]
            assert visit.queries.cu_seqlens.tolist() == [0, *visit.queries.lengths]
            assert visit.keys.cu_seqlens.tolist() == [0, *visit.keys.lengths]
            rows = slice(
                *(shard.start + x for x in (visit.query_rows.start, visit.query_rows.stop))
            )
            seen[rows, owner.start + sent.start : owner.start + sent.stop] += 1
    assert torch.equal(seen, want)
    met = {step for plan in plans for step in plan.visits}
    assert set(plans[0].steps) == met
    assert sum(len(plan.sends) for plan in plans) == sum(len(plan.visits) for plan in plans)


def test_a_plan_is_made_once_per_pack() -> None:
    layout = PackedLayout([[Text(20)], [Text(5)], [Text(0)], [Text(11)]], device="cpu")
    shard = layout.shard(1, 2)
    plan = shard.ring_plan(False)
    assert shard.ring_plan(False) is plan
    assert shard.ring_plan(True) is not plan
    assert plan.own.lengths == [2, 5, 11]
    assert plan.own.work(4).tolist() == [[2, 0], [2, 1], [2, 2], [1, 0], [1, 1], [0, 0]]
    assert plan.own.work(4) is plan.own.work(4)

    layout = PackedLayout([[Text(20)], [Text(12)]], capacity=32, device="cpu")
    shard = layout.shard(0, 2)
    assert shard.ring_plan(True).own.lengths == [16]
    layout.copy_(PackedLayout([[Text(4)], [Text(28)]], capacity=32, device="cpu"))
    assert shard.ring_plan(True).own.lengths == [4, 12]
