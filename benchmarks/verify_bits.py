"""Recompute the bits of an exported run from its files alone: python verify_bits.py RUN_DIR BITS.

Reads what `export=dense` or `export=packed` wrote, and needs numpy and safetensors, and nothing of
this project. Of every linear it recounts levels, codes, zeros and every stored bit; of all together
the budget and the effective bits, which must be those of `result.json`. Ends with exit code 1 and
a line if anything is not as promised.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import comb
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from safetensors import safe_open

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1"}


class Broken(Exception):
    """A promise that the files do not keep."""


def require(holds: Any, what: str) -> None:
    """Raise unless a promise is kept."""
    if not holds:
        raise Broken(what)


@dataclass
class Linear:
    """One linear as the files hold it; bits and groups are None where nothing is quantized."""

    name: str
    layout: dict[str, Any]
    weight: np.ndarray
    pruned: np.ndarray
    codes: np.ndarray
    bits: np.ndarray
    group: np.ndarray
    of: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    stored_bytes: int = 0


# --- files ----------------------------------------------------------------------------------------


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file, and where its tensors begin."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)), 8 + size


def read_tensor(path: Path, name: str) -> np.ndarray:
    """Read a tensor; bfloat16, which numpy lacks, is the upper half of float32."""
    header, start = read_header(path)
    entry = header[name]
    begin, end = entry["data_offsets"]
    raw = np.fromfile(path, "u1", end - begin, offset=start + begin)
    if entry["dtype"] == "BF16":
        values = (raw.view("<u2").astype("<u4") << 16).view("<f4")
    elif entry["dtype"] == "BOOL":
        values = raw.view(bool)
    else:
        values = raw.view(DTYPES[entry["dtype"]])
    return values.reshape(entry["shape"])


def round_to(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round to the nearest number of a type, ties to even."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return values.astype(dtype)
    bits = values.astype("<f4").view("<u4")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).view("<f4")


def check_hashes(run: Path) -> None:
    """Require that every file is the one that was committed."""
    manifest = run / "manifest.json"
    require(manifest.is_file(), f"{manifest} is missing")
    for name, entry in json.loads(manifest.read_text())["files"].items():
        path = run / name
        require(path.is_file(), f"{name} is missing")
        with path.open("rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]
        require(same, f"{name} is not what the run committed")


def read_layouts(path: Path) -> dict[str, dict[str, Any]]:
    """Return how the linears of a block are stored."""
    with safe_open(path, "numpy") as file:
        metadata = file.metadata() or {}
    require("layouts" in metadata, f"{path} does not say how its linears are stored")
    layouts = json.loads(metadata["layouts"])
    return {name: layouts["shared"] | own for name, own in layouts["linears"].items()}


# --- export=dense ---------------------------------------------------------------------------------


def read_dense(run: Path) -> Iterator[Linear]:
    """Yield the linears of `model/` with their grids."""
    places = {key: path for path in run.glob("model/*.safetensors") for key in read_header(path)[0]}
    for path in sorted(run.glob("grids/*.safetensors")):
        for name, layout in read_layouts(path).items():
            weight = np.full((layout["rows"], layout["columns"]), np.nan, "<f8")
            for part in layout["places"]:
                tensor = read_tensor(places[part["tensor"]], part["tensor"])
                tensor = tensor if part["expert"] is None else tensor[part["expert"]]
                rows, columns = map(indices, (part["rows"], part["columns"]))
                weight[np.ix_(rows, columns)] = tensor.T if part["transposed"] else tensor
            require(not np.isnan(weight).any(), f"{name}: weights are missing")
            if f"{name}.bits" not in read_header(path)[0]:
                changed = layout["status"] not in ("kept", "skipped", "untouched")
                require(not changed, f"{name}: it was compressed and has no grid")
                yield whole(name, layout, weight, np.zeros(weight.shape, bool))
                continue
            keys = ("pruned", "bits", "channel_group", "scale_group", "scale", "zero_point")
            pruned, bits, group, of, scale, zero = (
                read_tensor(path, f"{name}.{key}") for key in keys
            )
            codes = find_codes(layout, weight / scale[:, of], bits, zero[:, of])
            yield Linear(name, layout, weight, pruned, codes, bits, group, of, scale, zero)


def indices(short: Any) -> np.ndarray:
    """Return the rows or columns that a part holds."""
    return np.asarray(short["order"]) if isinstance(short, dict) else np.arange(*short)


def whole(name: str, layout: dict[str, Any], weight: np.ndarray, pruned: np.ndarray) -> Linear:
    """Return a linear of which nothing is quantized."""
    rows, columns = weight.shape
    zeros = np.zeros(columns, int)
    codes = np.zeros(weight.shape, int)
    ones = np.ones((rows, 1)), np.zeros((rows, 1), int)
    size = {"float64": 64, "float32": 32}.get(layout["dtype"], 16)
    return Linear(name, layout, weight, pruned, codes, zeros + size, zeros, zeros, *ones)


# --- export=packed --------------------------------------------------------------------------------


class Stream:
    """Bits that are read one field after the other, lowest bit first."""

    def __init__(self, path: Path, key: str) -> None:
        there = key in read_header(path)[0]
        self.bytes = read_tensor(path, key) if there else np.zeros(0, "u1")
        self.bits, self.at, self.key = np.unpackbits(self.bytes, bitorder="little"), 0, key

    def read(self, count: int, width: int) -> np.ndarray:
        """Read numbers of a width."""
        field = self.bits[self.at : self.at + count * width]
        require(len(field) == count * width, f"{self.key}: it is too short")
        self.at += count * width
        return field.reshape(count, width).astype(int) @ (1 << np.arange(width))

    def end(self) -> int:
        """Require that nothing is left but the rest of the last byte; return the bytes."""
        left = self.bits[self.at :]
        require(len(left) < 8 and not left.any(), f"{self.key}: it is too long")
        return len(self.bytes)


def read_packed(run: Path) -> Iterator[Linear]:
    """Yield the linears of `packed/`, decoded."""
    for path in sorted(run.glob("packed/*.safetensors")):
        for name, layout in read_layouts(path).items():
            yield unpack(path, name, layout)


def unpack(path: Path, name: str, layout: dict[str, Any]) -> Linear:
    """Decode one linear."""
    rows, columns = layout["rows"], layout["columns"]
    keys = ("codes", "scales", "zero_points", "pattern", "group_index")
    streams = {key: Stream(path, f"{name}.{key}") for key in keys}
    pruned = read_pattern(streams["pattern"], layout)
    if layout["groups"]:
        labels = streams["group_index"].read(columns, (layout["groups"] - 1).bit_length())
        bits = (streams["group_index"].read(layout["groups"], 4) + 1)[labels]
        of = chunks(labels, layout["group_size"])
        width = np.zeros(of.max() + 1, int)
        width[of] = bits
        scale, zero = np.ones((rows, len(width))), np.zeros((rows, len(width)), int)
        stored, size = width < 16, layout["scale_bits"]
        raw = streams["scales"].read(rows * int(stored.sum()), size)
        scale[:, stored] = raw.astype(f"<u{size // 8}").view(f"<f{size // 8}").reshape(rows, -1)
        for wide in np.unique(width[stored]):
            at = np.flatnonzero(width == wide)
            half = np.full(rows * len(at), 2 ** (wide - 1))
            if "grid" in layout:
                half = np.full(rows * len(at), 2 ** (wide - 1) - 1)
            elif not layout["symmetric"]:
                half = streams["zero_points"].read(rows * len(at), wide)
            zero[:, at] = half.reshape(rows, -1)
        linear = Linear(
            name, layout, pruned * 0.0, pruned, pruned * 0, bits, labels, of, scale, zero
        )
    else:
        linear = whole(name, layout, pruned * 0.0, pruned)
    for wide in np.unique(linear.bits):
        at = np.flatnonzero(linear.bits == wide)
        kept = ~pruned[:, at]
        read = np.zeros(kept.shape, int)
        read[kept] = streams["codes"].read(int(kept.sum()), wide)
        if wide >= 32:
            linear.weight[:, at] = read.astype(f"<u{wide // 8}").view(layout["dtype"])
        elif wide == 16:
            shift = 16 * (layout["dtype"] == "bfloat16")
            halves = (
                (read.astype("<u4") << 16).view("<f4") if shift else read.astype("<u2").view("<f2")
            )
            linear.weight[:, at] = halves * kept
        else:
            linear.codes[:, at] = read
            level = levels_of(layout, read, linear.bits[at], linear.zero[:, linear.of[at]])
            level = (linear.scale[:, linear.of[at]] * level).astype("<f4")
            linear.weight[:, at] = round_to(level, layout["model_dtype"]) * kept
    linear.stored_bytes = sum(stream.end() for stream in streams.values())
    return linear


def normal_float(bits: int) -> np.ndarray:
    """Return the levels of NormalFloat, computed in float32."""
    bits = int(bits)  # else numpy would count in float64
    tail = (1 / 2 ** (bits + 1) + 1 / (2 ** (bits + 1) - 2)) / 2
    first, middle = np.float32(round(1 - tail, 7)), np.float32(0.5)

    def quantiles(count: int) -> np.ndarray:
        step, at = (middle - first) / np.float32(count), np.arange(count, dtype="f4")
        near = at < (count + 1) // 2
        chances = np.where(near, first + step * at, middle - step * (count - at))
        return np.array([NormalDist().inv_cdf(float(chance)) for chance in chances], "f4")

    half = 2 ** (bits - 1)
    levels = np.concatenate([-quantiles(half - 1), np.zeros(1, "f4"), quantiles(half)[::-1]])
    return levels / levels.max()


def levels_of(
    layout: dict[str, Any], codes: np.ndarray, bits: np.ndarray, zero: np.ndarray
) -> np.ndarray:
    """Return the level of each code, column by column of a width."""
    if "grid" not in layout:
        return codes - zero
    require(layout["grid"] == "normal_float", f"a grid of unknown levels: {layout['grid']}")
    levels = np.zeros(codes.shape)
    for width in np.unique(bits[bits < 16]):
        table, at = normal_float(width), bits == width
        levels[:, at] = table[np.clip(codes[:, at], 0, len(table) - 1)]
    return levels


def find_codes(
    layout: dict[str, Any], value: np.ndarray, bits: np.ndarray, zero: np.ndarray
) -> np.ndarray:
    """Return the code of the level that each value is nearest to."""
    if "grid" not in layout:
        return np.rint(value).astype(int) + zero
    codes = np.zeros(value.shape, int)
    for width in np.unique(bits[bits < 16]):
        table, at = normal_float(width), bits == width
        codes[:, at] = np.searchsorted((table[1:] + table[:-1]) / 2, value[:, at])
    return codes


def read_pattern(stream: Stream, layout: dict[str, Any]) -> np.ndarray:
    """Read which weights are pruned: a bit each, or each window's rank among its combinations."""
    shape, sparsity = (layout["rows"], layout["columns"]), layout["sparsity"]
    n, m = sparsity["n"], sparsity["m"]
    if sparsity["ratio"] == 0:
        return np.zeros(shape, bool)
    if not m:
        return stream.read(shape[0] * shape[1], 1).astype(bool).reshape(shape)
    rank = stream.read(shape[0] * shape[1] // m, (comb(m, n) - 1).bit_length())
    left, kept = np.full(len(rank), n), np.zeros((len(rank), m), bool)
    for position in reversed(range(m)):
        below = np.array([comb(position, count) for count in range(n + 1)])[left]
        kept[:, position] = rank >= below
        rank, left = rank - below * kept[:, position], left - kept[:, position]
    return ~kept.reshape(shape)


def chunks(labels: np.ndarray, size: int) -> np.ndarray:
    """Number the runs of at most so many channels of one group, group by group."""
    order = np.argsort(labels, kind="stable")
    shared, count, before, run = np.zeros(len(labels), int), -1, None, 0
    for channel in order:
        if labels[channel] != before or run == size:
            count, before, run = count + 1, labels[channel], 0
        shared[channel], run = count, run + 1
    return shared


# --- what is promised -----------------------------------------------------------------------------


def check(linear: Linear) -> int:
    """Require of one linear zeros, grid and levels; return every bit that it is stored in."""
    layout, weight, pruned, bits, of = (
        linear.layout, linear.weight, linear.pruned, linear.bits, linear.of
    )  # fmt: skip
    name, sparsity, dtype = linear.name, layout["sparsity"], layout["model_dtype"]
    require(weight.shape == (layout["rows"], layout["columns"]), f"{name}: its shape")
    require((weight[pruned] == 0).all(), f"{name}: a pruned weight is not zero")
    require(sparsity["ratio"] or not pruned.any(), f"{name}: pruned though it was not asked")
    if sparsity["m"]:
        kept = (~pruned).reshape(len(pruned), -1, sparsity["m"]).sum(-1)
        require((kept == sparsity["n"]).all(), f"{name}: a window keeps another number of weights")
    whole = weight[:, bits >= 16]
    halves = round_to(whole, layout["dtype"])
    require(
        (halves == whole).all(),
        f"{name}: a weight of an unquantized channel has more bits than are counted",
    )
    check_groups(linear)
    quantized = ~pruned & (bits < 16)
    width, scale_bits = np.zeros(of.max() + 1, int), layout["scale_bits"]
    width[of] = bits
    stored = linear.scale[:, width < 16]
    exact = (
        (stored > 0) & np.isfinite(stored) & (stored == round_to(stored, f"<f{scale_bits // 8}"))
    )
    require(exact.all(), f"{name}: a scale is no positive float{scale_bits}")
    zero = linear.zero[:, width < 16]
    require(((zero >= 0) & (zero < 2 ** width[width < 16])).all(), f"{name}: a zero point")
    if layout["symmetric"]:
        require((zero == 2 ** (width[width < 16] - 1)).all(), f"{name}: a zero point is stored")
    level = levels_of(layout, linear.codes, bits, linear.zero[:, of])
    level = (linear.scale[:, of] * level).astype("<f4")
    require(
        (round_to(level, dtype) == weight)[quantized].all(), f"{name}: a weight is off its grid"
    )
    fits = (linear.codes >= 0) & (linear.codes < 2.0**bits)
    require(fits[quantized].all(), f"{name}: a code is out of range")
    for scale_group in np.flatnonzero(width < 16):
        most = max(len(np.unique(row)) for row in weight[:, of == scale_group])
        require(most <= 2 ** width[scale_group], f"{name}: {most} levels")
    return count(linear, width)


def check_groups(linear: Linear) -> None:
    """Require that groups and scale groups are those that the layout counts."""
    layout, name, bits = linear.layout, linear.name, linear.bits
    if layout["groups"] == 0:
        require((bits >= 16).all(), f"{name}: quantized, and counted as if it were not")
        return
    _, labels = np.unique(linear.group, return_inverse=True)
    require(labels.max() + 1 == layout["groups"], f"{name}: another number of groups")
    require((chunks(labels, layout["group_size"]) == linear.of).all(), f"{name}: its scale groups")
    for group in range(layout["groups"]):
        require(len(np.unique(bits[labels == group])) == 1, f"{name}: a group of two widths")


def count(linear: Linear, width: np.ndarray) -> int:
    """Count codes, scales, zero points, pattern and group index."""
    layout, kept = linear.layout, ~linear.pruned
    rows, columns = kept.shape
    total = int((kept * linear.bits).sum())
    sparsity = layout["sparsity"]
    if sparsity["m"]:
        windows = rows * columns // sparsity["m"]
        total += windows * (comb(sparsity["m"], sparsity["n"]) - 1).bit_length()
    elif sparsity["ratio"]:
        total += rows * columns
    if layout["groups"]:
        stored = width[width < 16]
        total += rows * len(stored) * layout["scale_bits"]
        free = not layout["symmetric"] and "grid" not in layout
        total += rows * int(stored.sum()) if free else 0
        total += columns * (layout["groups"] - 1).bit_length() + 4 * layout["groups"]
    return total


def steps(linear: Linear) -> list[int]:
    """Return what each group would cost to get the next width that its linear has."""
    widths = sorted(set(linear.bits.tolist()))
    following = dict(pairwise(widths))
    return [
        linear.weight.shape[0] * int(size) * (following[width] - width)
        for width, size in (
            (int(linear.bits[linear.group == g][0]), (linear.group == g).sum())
            for g in np.unique(linear.group)
        )
        if width in following
    ]


def verify(run: Path, requested: float) -> None:
    """Check every linear of a run, and all together."""
    check_hashes(run)
    result = json.loads((run / "result.json").read_text())
    parts = {"grids": read_dense, "packed": read_packed}
    found = [part for part in parts if any(run.glob(f"{part}/*.safetensors"))]
    require(found, f"{run} holds no grids and nothing packed: was it run with export=dense|packed?")
    alone = bool(result["config"]["wbits"]["scope"] == "linear")
    for part in found:
        weights = planned = average = effective = pruned = in_files = 0
        for linear in parts[part](run):
            total, size = check(linear), linear.weight.size
            codes = linear.weight.shape[0] * int(linear.bits.sum())
            asked = linear.layout["planned_bits"] * size
            fallen = linear.layout["status"] in ("kept", "skipped", "untouched")
            left = requested * size - codes
            if alone and not fallen and not result["config"]["wbits"]["tied"]:
                require(left >= 0, f"{linear.name}: over the budget")
                least = min(steps(linear), default=left + 1)
                require(left < least, f"{linear.name}: the budget could still buy a group")
            planned += asked if fallen else codes
            weights, average, effective = weights + size, average + codes, effective + total
            pruned, in_files = pruned + int(linear.pruned.sum()), in_files + linear.stored_bytes
            print(
                f"{linear.name}: {codes / size:.4f} bits, {total / size:.4f} effective, "
                f"{linear.pruned.mean():.4f} pruned, {linear.layout['status']}"
            )
        require(weights == result["weights"], f"{weights} weights, and not {result['weights']}")
        require(planned <= requested * weights + 1e-6, "the budget of all linears is exceeded")
        recount = {"average": average / weights, "effective": effective / weights}
        for key, value in recount.items():
            told = result["bits"][key]
            require(
                abs(value - told) < 1e-9, f"{key} bits are {value}, and result.json says {told}"
            )
        told = result["sparsity"]
        require(abs(pruned / weights - told) < 1e-9, f"{pruned / weights} pruned, and not {told}")
        print(f"{part}/: {recount['average']:.4f} bits, {recount['effective']:.4f} effective")
        if part == "packed":
            files = sum(path.stat().st_size for path in run.glob("packed/*.safetensors"))
            print(
                f"packed/: {8 * in_files / weights:.4f} bits a weight in streams of whole bytes, "
                f"{8 * files / weights:.4f} with the headers of its files"
            )


if __name__ == "__main__":
    try:
        verify(Path(sys.argv[1]), float(sys.argv[2]))
    except (Broken, KeyError, ValueError, OSError) as broken:
        sys.exit(f"verify_bits: {type(broken).__name__}: {broken}")
