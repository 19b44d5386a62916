"""Recompute the bits of an exported run from its files alone: python verify_bits.py RUN_DIR BITS.

Needs numpy and safetensors, and nothing of this project.
"""

import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

run, requested = Path(sys.argv[1]), float(sys.argv[2])
grids, weights = (
    {k: v for file in run.glob(f"{part}/*.safetensors") for k, v in load_file(file).items()}
    for part in ("grids", "model")
)
assert grids, f"{run} holds no grids: was it run with export=dense?"
for name in sorted(key.removesuffix(".bits") for key in grids if key.endswith(".bits")):
    bits, group, of, scale, zero, pruned = (
        grids[f"{name}.{key}"]
        for key in ("bits", "channel_group", "scale_group", "scale", "zero_point", "pruned")
    )
    weight = weights[f"{name}.weight"]
    weight = weight if weight.shape == pruned.shape else weight.T
    assert (weight[pruned] == 0).all(), f"{name}: a pruned weight is not zero"
    code = np.rint(weight / scale[:, of]) + zero[:, of]
    kept = ~pruned & (bits < 16)
    assert (np.float32(scale[:, of] * (code - zero[:, of])) == weight)[kept].all(), f"{name}: grid"
    assert ((code >= 0) & (code < 2.0**bits))[kept].all(), f"{name}: a code out of range"
    for scale_group in np.unique(of[bits < 16]):
        columns = of == scale_group
        most = max(len(np.unique(row)) for row in weight[:, columns])
        assert most <= 2 ** bits[columns][0], f"{name}: {most} levels at {bits[columns][0]} bits"
    left = requested * bits.size - bits.sum(dtype=float)
    steps = [np.sum(group == g) for g in np.unique(group) if bits[group == g][0] < bits.max()]
    assert left >= 0, f"{name}: over the budget"
    assert not steps or left < min(steps), f"{name}: the budget could still buy a group"
    print(f"{name}: {bits.mean():.4f} bits, {pruned.mean():.4f} pruned")
