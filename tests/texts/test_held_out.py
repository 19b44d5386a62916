"""Held-out sequences come from the calibration text and share no token with the calibration."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from word_tokenizers import ADDING, PLAIN, numbered

from mi_experiments.config.texts import BosPolicy, Sampling
from mi_experiments.errors import InputError
from mi_experiments.texts.sequences import calibration_tokens, held_out_tokens


def draw(
    documents: list[str], nsamples: int, count: int, seqlen: int, seed: int, sampling: str
) -> tuple[Tensor, Tensor]:
    """Return calibration and held-out sequences."""
    options = {"nsamples": nsamples, "seqlen": seqlen, "seed": seed}
    policy = {"sampling": Sampling(sampling), "add_bos": BosPolicy.never}
    return (
        calibration_tokens(PLAIN, documents, allow_fewer=True, **options, **policy),
        held_out_tokens(PLAIN, documents, count=count, **options, **policy),
    )


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=12),
    nsamples=st.integers(1, 6),
    count=st.integers(1, 5),
    seqlen=st.integers(2, 12),
    seed=st.integers(0, 5),
    sampling=st.sampled_from(["packed", "document"]),
)
def test_no_token_is_in_both(
    lengths: list[int], nsamples: int, count: int, seqlen: int, seed: int, sampling: str
) -> None:
    """No word occurs twice in these documents, so equal tokens would be the same place."""
    documents = numbered(*lengths)
    wanted = (nsamples + count) * seqlen
    # Documents are read whole: what the last one has left over makes windows with none of the next.
    surely = {
        "packed": sum(lengths) >= wanted + seqlen,
        "document": sum(length > seqlen for length in lengths) >= nsamples + count,
    }[sampling]
    try:
        used, held_out = draw(documents, nsamples, count, seqlen, seed, sampling)
    except InputError:
        assert not surely
        return
    assert held_out.shape == (count, seqlen)
    assert len(torch.cat((used, held_out)).unique()) == used.numel() + held_out.numel()
    assert held_out.min() >= 10
    assert held_out.max() < 10 + sum(lengths)


def test_a_single_text_gives_windows_that_were_not_drawn() -> None:
    (document,) = numbered(100)
    used, held_out = draw([document], 6, 4, 10, 0, "packed")
    starts = sorted([*used[:, 0].tolist(), *held_out[:, 0].tolist()])
    assert starts == list(range(10, 110, 10))


@pytest.mark.parametrize("sampling", ["packed", "document"])
def test_too_little_text_is_named_with_the_remedy(sampling: str) -> None:
    with pytest.raises(
        InputError, match=r"needs 4 .* of 10 tokens beyond the 2 .* has 1: lower dataset.nsamples"
    ):
        draw(numbered(11, 11, 11), 2, 4, 10, 0, sampling)


def test_draws_with_replacement_are_refused() -> None:
    with pytest.raises(InputError, match="draws with replacement: choose packed or document"):
        draw(numbered(100), 2, 4, 10, 0, "published")


def test_documents_begin_as_those_of_calibration_do() -> None:
    tokens = held_out_tokens(
        ADDING, numbered(9, 9, 9), count=1, nsamples=2, seqlen=10, seed=0,
        sampling=Sampling.packed, add_bos=BosPolicy.auto,
    )  # fmt: skip
    assert tokens[0, 0] == 1


@pytest.mark.parametrize("sampling", ["packed", "document"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_copies_of_what_was_measured_on_are_not_held_out(sampling: str, seed: int) -> None:
    """Every document is there twice, as text that was downloaded two times."""
    documents = numbered(*[13] * 24)
    again = [f"  {document}\r\n" for document in documents]
    nsamples, count = (20, 12) if sampling == "packed" else (8, 8)
    used, held_out = draw([*documents, *again], nsamples, count, 6, seed, sampling)
    assert not set(used.flatten().tolist()) & set(held_out.flatten().tolist())


def test_where_all_is_copied_nothing_is_left_to_hold_out() -> None:
    with pytest.raises(InputError, match=r"beyond the 1 .* the text has 3"):
        draw(numbered(40) * 6, 1, 4, 10, 0, "packed")
