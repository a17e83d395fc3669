"""`python -m model.judge certify | score | freeze`: see docs/benchmark.md."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from model.checkpoint import write_json
from model.cli import Parser, positive, run
from model.judge import frozen
from model.judge.certify import certify
from model.judge.clips import score_folder
from model.vae import load_vae

PROG = "python -m model.judge"


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog=PROG, description="Read clips with the frozen oracle.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    score = commands.add_parser("score", help="score clips against their prompts")
    score.add_argument("--clips", type=Path, required=True, help="folder of .mp4 or .npy files")
    score.add_argument("--prompts", type=Path, required=True, help="file: NAME, a tab, the prompt")
    score.add_argument("--json", type=Path, required=True, help="where the scores go")
    check = commands.add_parser("certify", help="measure the oracle itself")
    check.add_argument("--json", type=Path, required=True, help="where the certificate goes")
    check.add_argument("--checkpoint", type=Path, help="folder of a VAE for round trips")
    check.add_argument("--clips", type=positive, default=512, help="of one object at 32x32 (512)")
    check.add_argument("--others", type=positive, default=40, help="of other kinds, sizes (40)")
    check.add_argument("--noised", type=positive, default=128, help="for each noise (128)")
    commands.add_parser("freeze", help="add the hashes of a new version to frozen.json")
    args = parser.parse_args(argv)
    if args.command == "freeze":
        frozen.freeze(datetime.now(timezone.utc).date().isoformat())
        print(frozen.FROZEN)
        return
    frozen.check()
    if args.command == "score":
        report = score_folder(args.clips, args.prompts)
        write_json(args.json, report)
        total = report["metrics"]["all"]
        print(f"all {total['value']:.3f} [{total['low']:.3f}, {total['high']:.3f}] n={total['n']}")
        return
    torch.set_num_threads(1)
    vae = None if args.checkpoint is None else load_vae(args.checkpoint)
    certify(vae, args.clips, args.others, args.noised, lambda found: write_json(args.json, found))
    print(args.json)


if __name__ == "__main__":
    run(PROG, main)
