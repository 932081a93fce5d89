"""RoPeSLR Doctor without ComfyUI: `python -m benchmarks.doctor [--size 832x480x81] [--tune]`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from . import load_pack

doctor = load_pack(".attention.doctor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--size", default="832x480x81", help="width x height x frames of the video, in pixels"
    )
    parser.add_argument(
        "--pixels", type=int, default=16, help="pixels to a token: 16, or 32 for Wan 2.2 5B"
    )
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--tune", action="store_true", help="try the kernels' variants, no more")
    parser.add_argument(
        "--keep", type=Path, help="keep what was tuned in this file (ComfyUI's: see the node)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    width, height, length = (int(side) for side in options.size.lower().split("x"))
    grid = (
        (length - 1) // 4 + 1,
        max(1, height // options.pixels),
        max(1, width // options.pixels),
    )
    device = torch.device(options.device)
    if options.tune:
        print("\n".join(doctor.tune(device, grid, options.sparsity, options.keep)))
        return
    print(doctor.examine(device, grid, options.sparsity, options.seconds, kept_in=options.keep))


if __name__ == "__main__":
    main()
