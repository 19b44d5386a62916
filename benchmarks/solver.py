"""Compare the sweep with the published SparseGPT recursion and with the matrix-product limit.

All three run in the same process, in turn, and the fastest of several repetitions counts:

    python benchmarks/solver.py 1024x1024 512x1024 --threads 1

A table row is one shape and task. `limit` is the time of (c³/3 + r·c²) floating-point operations
(one Cholesky factorisation and the updates) at the rate measured here for a square product. The
last columns check that the two solvers agree: how the mean loss of the sweep compares with that
of the recursion, both under the damped Hessian in float64.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from mi_experiments.method.grid import Grid, fit_grid, scale_groups
from mi_experiments.method.hessian import factorize
from mi_experiments.method.pruning import Sparsity
from mi_experiments.method.sparsegpt import sweep

DAMPING = 0.01
HALF = Sparsity(0.5)
BLOCK = 128


def published_recursion(
    weight: Tensor, hessian: Tensor, grid: Grid | None, sparsity: Sparsity | None
) -> Tensor:
    """Solve as arXiv:2301.00774, algorithm 1, is usually written: two factors, a sort, a loop."""
    weight = weight.clone()
    columns = len(hessian)
    damped = hessian.clone()
    damped.diagonal().add_(DAMPING * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    inverse = torch.linalg.cholesky(inverse, upper=True)
    if grid is not None:
        scale, zero = grid.scale[:, grid.scale_group], grid.zero_point[:, grid.scale_group]
        top = 2 ** grid.bits.int() - 1
    for low in range(0, columns, BLOCK):
        high = min(low + BLOCK, columns)
        block = weight[:, low:high].clone()
        done, errors = torch.zeros_like(block), torch.zeros_like(block)
        factor = inverse[low:high, low:high]
        pruned = torch.zeros_like(block, dtype=torch.bool)
        if sparsity is not None:
            saliency = block**2 / factor.diagonal()[None, :] ** 2
            threshold = saliency.flatten().sort().values[int(saliency.numel() * sparsity.ratio)]
            pruned = saliency <= threshold
        for j in range(high - low):
            value = block[:, j].clone()
            value[pruned[:, j]] = 0
            if grid is not None:
                k = low + j
                codes = torch.clamp(torch.round(value / scale[:, k]) + zero[:, k], 0, top[k])
                value = scale[:, k] * (codes - zero[:, k])
            error = (block[:, j] - value) / factor[j, j]
            block[:, j:] -= error[:, None].matmul(factor[j, j:][None, :])
            done[:, j], errors[:, j] = value, error
        weight[:, low:high] = done
        weight[:, high:] -= errors.matmul(inverse[low:high, high:])
    return weight


def fastest(work: list[Callable[[], object]], repetitions: int, device: str) -> list[float]:
    """Seconds of each piece of work, taken in turn so that a busy machine disturbs all alike.

    On one CPU thread they are seconds of processor time, which other processes do not lengthen.
    """
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter

    def seconds(task: Callable[[], object]) -> float:
        start = clock()
        task()
        if device != "cpu":
            torch.cuda.synchronize()
        return clock() - start

    runs = [[seconds(task) for task in work] for _ in range(repetitions + 1)]
    return [min(times) for times in zip(*runs[1:], strict=True)]


def problem(rows: int, columns: int, device: str) -> tuple[Tensor, Tensor]:
    """Weights, and the Hessian of coupled activations with a few outlier channels."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    energy = torch.exp(torch.randn(columns, generator=generator) / 2)
    energy[::97] *= 10
    tokens = torch.randn(2 * columns, columns, generator=generator)
    tokens = (tokens + tokens @ mixing) * energy
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    return weight.to(device), (2 / len(tokens) * tokens.T @ tokens).to(device)


def mean_loss(weight: Tensor, result: Tensor, hessian: Tensor) -> float:
    """Mean quadratic error of a row under the damped Hessian."""
    hessian = hessian.double()
    damping = DAMPING * hessian.diagonal().mean()
    error = weight.double() - result.double()
    return (((error @ hessian) * error).sum(1) + damping * error.square().sum(1)).mean().item()


def product_rate(size: int, device: str, repetitions: int) -> float:
    """Floating-point operations per second of a square float32 product."""
    left, right = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    return 2 * size**3 / fastest([lambda: left @ right], repetitions, device)[0]


def report(rows: int, columns: int, repetitions: int, device: str) -> None:
    """Print the rows of the table for one shape."""
    weight, hessian = problem(rows, columns, device)
    bits = torch.full((columns,), 4, dtype=torch.uint8, device=device)
    groups = scale_groups(torch.zeros(columns, dtype=torch.int64, device=device), None)
    four = fit_grid(weight, bits, groups, clip_search=False)
    rate = product_rate(min(2048, max(rows, columns)), device, repetitions)
    limit = (columns**3 / 3 + rows * columns**2) / rate
    for name, grid, sparsity in (
        ("prune", None, HALF),
        ("quantize", four, None),
        ("joint", four, HALF),
    ):
        factor = factorize(hessian, damping=DAMPING)
        recursion, factorization, ours = fastest(
            [
                lambda grid=grid, sparsity=sparsity: published_recursion(
                    weight, hessian, grid, sparsity
                ),
                lambda: factorize(hessian, damping=DAMPING),
                lambda grid=grid, sparsity=sparsity, factor=factor: sweep(
                    weight, factor, grid=grid, sparsity=sparsity
                ),
            ],
            repetitions,
            device,
        )
        reference = published_recursion(weight, hessian, grid, sparsity)
        result = sweep(weight, factor, grid=grid, sparsity=sparsity).weight
        loss = mean_loss(weight, result, hessian) / mean_loss(weight, reference, hessian)
        total = factorization + ours
        print(
            f"{rows:>6}x{columns:<6} {name:<9} {recursion:9.4f} {factorization:9.4f} {ours:9.4f} "
            f"{limit:9.4f} {recursion / total:10.2f}x {total / limit:10.2f}x {loss:10.4f}"
        )


def main() -> None:
    """Read the shapes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="+", help="ROWSxCOLUMNS, for example 1024x1024")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.device}, {arguments.threads} threads; seconds")
    print(
        f"{'shape':>13} {'task':<9} {'published':>9} {'factor':>9} {'sweep':>9} {'limit':>9} "
        f"{'speed-up':>11} {'of limit':>11} {'loss ratio':>10}"
    )
    for shape in arguments.shapes:
        rows, columns = (int(side) for side in shape.split("x"))
        report(rows, columns, arguments.repetitions, arguments.device)


if __name__ == "__main__":
    main()
