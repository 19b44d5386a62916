"""The estimators against nearest neighbours, on what the channels of a real model carry.

The oracle is the estimator of Kraskov et al. (2004, Phys. Rev. E 69:066138, as in scikit-learn),
which assumes nothing about the marginals or the copula. Every tolerance is four standard errors of
the difference, and every standard error is the spread of the estimator over eighths of the tokens.
"""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from sklearn.feature_selection import mutual_info_regression
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mi_experiments.config.texts import BosPolicy, Sampling
from mi_experiments.embedded import MODEL_DIRECTORY, language
from mi_experiments.llm.walker import Walker
from mi_experiments.method.information import (
    binned_information,
    copula_information,
    gaussian_information,
)
from mi_experiments.texts.sequences import calibration_tokens

PARTS = 8
PAIRS = 6
Estimate = Callable[[Tensor], float]


def copula(pair: Tensor) -> float:
    return copula_information(pair)[0, 1].item()


def gaussian(pair: Tensor) -> float:
    return gaussian_information(torch.cov(pair.T, correction=0), len(pair))[0, 1].item()


def binned(bins: int) -> Estimate:
    return lambda pair: binned_information(pair, bins)[0, 1].item()


def neighbours(pair: Tensor) -> float:
    """Normal scores leave the information as it is, and suit neighbourhoods."""
    ranks = pair.argsort(0).argsort(0)
    scores = torch.special.ndtri((ranks + 1) / (len(pair) + 1)).numpy()
    return float(mutual_info_regression(scores[:, :1], scores[:, 1], random_state=0)[0])


def measure(estimate: Estimate, pair: Tensor) -> tuple[float, float]:
    """Return an estimate and its standard error."""
    parts = torch.tensor([estimate(pair[start::PARTS]) for start in range(PARTS)])
    return estimate(pair), parts.std().item() / math.sqrt(PARTS)


@pytest.fixture(scope="module")
def pairs() -> list[Tensor]:
    """Pairs of channels of every site of a block, from the most dependent to the least."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIRECTORY, local_files_only=True).eval()
    tokens = calibration_tokens(
        AutoTokenizer.from_pretrained(MODEL_DIRECTORY, local_files_only=True),
        language.documents("calibration", 600), nsamples=40, seqlen=128, seed=0,
        sampling=Sampling.packed, allow_fewer=False, add_bos=BosPolicy.auto,
    )  # fmt: skip
    block = next(b for b in Walker(model, batch_size=16).walk(tokens) if b.index == 1)
    read: dict[str, list[Tensor]] = {site.name: [] for site in block.sites}
    block.feed(block.sites, lambda site, inputs: read[site.name].append(inputs.clone()))
    found = []
    for inputs in (torch.cat(batches).double() for batches in read.values()):
        # The same words in the same place have the same activations, which are one observation.
        distinct = inputs.unique(dim=0)
        order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(0))
        sample = distinct[order[:3000], :96]
        information = copula_information(sample)
        first, second = torch.triu_indices(96, 96, 1)
        order = information[first, second].argsort(descending=True)
        chosen = order[torch.linspace(0, len(order) - 1, PAIRS).long()]
        found += [sample[:, [first[i], second[i]]] for i in chosen]
    assert len(found) == 4 * PAIRS
    return found


def measure_all(estimate: Estimate, pairs: list[Tensor]) -> Tensor:
    """Return estimates and standard errors of all pairs."""
    return torch.tensor([measure(estimate, pair) for pair in pairs]).T


def excess(lower: Tensor, upper: Tensor) -> Tensor:
    """Return by how many standard errors what cannot be more is more."""
    return (lower[0] - upper[0]) / lower[1].hypot(upper[1])


@pytest.fixture(scope="module")
def truth(pairs: list[Tensor]) -> Tensor:
    return measure_all(neighbours, pairs)


@pytest.mark.slow
def test_copula_is_a_lower_bound_on_every_real_pair(pairs: list[Tensor], truth: Tensor) -> None:
    assert excess(measure_all(copula, pairs), truth).max() < 4


@pytest.mark.slow
def test_finer_bins_lose_less_and_never_exceed_the_truth(
    pairs: list[Tensor], truth: Tensor
) -> None:
    """Data processing: 8 bins are made of 16, and those of 32, and all of them of the values."""
    ladder = [measure_all(binned(bins), pairs) for bins in (8, 16, 32)]
    for coarse, fine in itertools.pairwise([*ladder, truth]):
        assert excess(coarse, fine).max() < 4
    # And what they lose is little beside what tells pairs apart.
    ranks = torch.stack((ladder[-1][0], truth[0])).argsort(1).argsort(1).double()
    assert torch.corrcoef(ranks)[0, 1] > 0.9


@pytest.mark.slow
def test_copula_misses_what_bins_and_neighbours_see(pairs: list[Tensor], truth: Tensor) -> None:
    """Real channels depend on each other in more ways than a correlation of ranks."""
    copulas, bins = measure_all(copula, pairs), measure_all(binned(8), pairs)
    unseen = (excess(bins, copulas) > 4) & (excess(truth, copulas) > 4)
    assert unseen.double().mean() > 0.5


@pytest.mark.slow
def test_all_agree_where_the_copula_is_gaussian(pairs: list[Tensor]) -> None:
    """Each pair is replaced by Gaussian tokens of the same correlation of normal scores."""
    twins, known = [], []
    for seed, pair in enumerate(pairs):
        rho = math.sqrt(1 - math.exp(-2 * max(copula(pair), 0)))
        noise = torch.randn(pair.shape, generator=torch.Generator().manual_seed(seed)).to(pair)
        noise[:, 1] = rho * noise[:, 0] + math.sqrt(1 - rho**2) * noise[:, 1]
        # Monotone maps of the marginals, as far from Gaussian as activations are.
        twins.append(torch.stack((noise[:, 0].exp(), noise[:, 1] ** 3), 1))
        known.append(-0.5 * math.log(1 - rho**2))
    oracle = measure_all(neighbours, twins)
    estimates = measure_all(copula, twins)
    assert excess(estimates, oracle).abs().max() < 4
    error = (estimates[0] - torch.tensor(known)).abs()
    assert (error < 4 * estimates[1] + 4 / len(pairs[0])).all()
    assert (measure_all(gaussian, twins)[0][0] - known[0]).abs() > 0.01
