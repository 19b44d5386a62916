"""Published protocols, on corpora so small that every token was written down by hand.

A word is a number and its own id. Words of a row are joined by hyphens, which the tokenizer drops;
so all white space stands between rows, where a space is 2 and a line break is 3. BOS is 1. Windows
have 4 tokens. The conventions are those of the loading code that was published with GPTQ
(arXiv:2210.17323, `IST-DASLab/gptq`), SparseGPT (arXiv:2301.00774) and Wanda (arXiv:2306.11695).
"""

import gzip
import json
import math
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from composed import config_of
from evaluations import measure_perplexity
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence as Steps
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mi_experiments.commands.reproduce import compose_row, find_rows
from mi_experiments.config.compose import from_hydra
from mi_experiments.errors import InputError
from mi_experiments.llm.walker import Walker
from mi_experiments.texts.sources import EvaluationText, calibration_sequences, evaluation_texts

BOS = "<s>"
NAMES = {0: "<unk>", 1: BOS, 2: " ", 3: "\n"}


def build_tokenizer(*, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """LLaMA's way with BOS; without, GPT-2's, and that of OPT's fast tokenizer."""
    tokenizer = Tokenizer(WordLevel({NAMES.get(i, str(i)): i for i in range(1300)}, "<unk>"))
    tokenizer.pre_tokenizer = Steps([Split("-", "removed"), Split(Regex("[ \n]"), "isolated")])
    if adds_bos:
        tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS)


TOKENIZER = build_tokenizer()
BARE = build_tokenizer(adds_bos=False)

# With BOS 4, 9, 5 and 7 tokens: the first is not longer than a window.
LONG = ["60-61-62", "70-71-72-73-74-75-76-77", "80-81-82-83", "90-91-92-93-94-95"]
ROWS = {
    ("wikitext2", "train"): ["10-11-12", "", "13-14", "15-16-17"],
    ("wikitext2", "validation"): ["18"],
    ("wikitext2", "test"): ["", "20-21", "", "22-23-24", ""],
    ("ptb", "train"): ["30-31", "32", "33-34-35", "36-37-38-39"],
    ("ptb", "validation"): ["40", "41-42", "43"],
    ("ptb", "test"): ["50-51", "52", "53-54-55"],
    ("c4", "train"): LONG,
    # The last row is beyond the first 1,100, which are read.
    ("c4", "validation"): [*(str(100 + i) for i in range(1100)), "9-9-9-9-9-9-9-9"],
}


def write_corpora(root: Path, changes: dict[tuple[str, str], list[str]]) -> list[str]:
    """Write every corpus as the hub has it, and return the overrides that name the folder."""
    corpora = configure("model.seqlen=4").corpora
    for (name, split), rows in {**ROWS, **changes}.items():
        (file,) = corpora[name].splits[split]
        path = root / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        field = corpora[name].text_field
        if path.suffix == ".parquet":
            pq.write_table(pa.table({field: rows}), path)
        else:
            path.write_bytes(
                gzip.compress("\n".join(json.dumps({field: x}) for x in rows).encode())
            )
    return [f"corpora.{name}.path={root / name}" for name in corpora]


configure = partial(config_of, base=["cache=false"])


def evaluated(
    root: Path,
    *overrides: str,
    tokenizer: PreTrainedTokenizerFast = TOKENIZER,
    **changes: list[str],
) -> dict[str, EvaluationText]:
    """Cut the texts of a protocol; `c4_validation=[…]` gives a part of a corpus other rows."""
    named = {tuple(key.rsplit("_", 1)): rows for key, rows in changes.items()}
    config = configure("model.seqlen=4", *overrides, *write_corpora(root, named))
    return {text.name: text for text in evaluation_texts(tokenizer, config)}


def calibrated(
    root: Path,
    *overrides: str,
    tokenizer: PreTrainedTokenizerFast = TOKENIZER,
    **changes: list[str],
) -> list[list[int]]:
    named = {tuple(key.rsplit("_", 1)): rows for key, rows in changes.items()}
    given = ["model.seqlen=4", "dataset.sampling=published", "dataset.nsamples=6", *overrides]
    config = configure(*given, *write_corpora(root, named))
    return calibration_sequences(tokenizer, config).tolist()


def ids(windows: Sequence[Tensor]) -> list[list[int]]:
    return [window.tolist() for window in windows]


# What is evaluated


@pytest.mark.parametrize("protocol", ["sparsegpt", "gptq_old"])
def test_wikitext2_is_its_test_rows_with_a_blank_line_between(
    protocol: str, tmp_path: Path
) -> None:
    text = evaluated(tmp_path, f"evaluation={protocol}", c4_validation=LONG)["wikitext2"]
    # "" ⏎⏎ 20 21 ⏎⏎ "" ⏎⏎ 22 23 24 ⏎⏎ "": BOS and 13 tokens, of which the last two fill no window.
    assert ids(text.windows) == [[1, 3, 3, 20], [21, 3, 3, 3], [3, 22, 23, 24]]
    assert (text.cut, text.dropped_tokens, text.bos) == ("joined", 2, True)


def test_the_new_ptb_is_the_test_part_with_spaces(tmp_path: Path) -> None:
    text = evaluated(tmp_path, "evaluation=sparsegpt")["ptb"]
    # 50 51 ␣ 52 ␣ 53 54 55: BOS and 8 tokens, one left over.
    assert ids(text.windows) == [[1, 50, 51, 2], [52, 2, 53, 54]]
    assert text.dropped_tokens == 1


def test_the_old_ptb_is_the_validation_part_with_blank_lines(tmp_path: Path) -> None:
    text = evaluated(tmp_path, "evaluation=gptq_old", c4_validation=LONG)["ptb"]
    # 40 ⏎⏎ 41 42 ⏎⏎ 43: BOS and 8 tokens, one left over.
    assert ids(text.windows) == [[1, 40, 3, 3], [41, 42, 3, 3]]
    assert text.dropped_tokens == 1


def test_the_new_c4_is_256_windows_of_the_first_1100_rows_with_spaces(tmp_path: Path) -> None:
    text = evaluated(tmp_path, "evaluation=sparsegpt")["c4"]
    # BOS 100 ␣ 101 ␣ … ␣ 1199: 2,200 tokens, of which 256 windows take the first 1,024. The token
    # in an odd place k is 100 + (k - 1) / 2.
    assert ids(text.windows[:3]) == [[1, 100, 2, 101], [2, 102, 2, 103], [2, 104, 2, 105]]
    assert text.windows[-1].tolist() == [2, 610, 2, 611]
    assert (len(text.windows), text.dropped_tokens) == (256, 2200 - 1024)


def test_where_1100_rows_fill_fewer_windows_they_are_all_there_is(tmp_path: Path) -> None:
    text = evaluated(tmp_path, "evaluation=c4", "model.seqlen=16")["c4"]
    # 2,200 = 137 · 16 + 8; window 137 has places 2176 to 2191. Nothing of row 1,101, the nines.
    assert len(text.windows) == 137
    assert text.windows[-1].tolist()[1::2] == [*range(1188, 1196)]
    assert text.dropped_tokens == 8
    assert 9 not in torch.cat(list(text.windows))


def test_the_old_c4_is_windows_of_single_rows_drawn_with_seed_0(tmp_path: Path) -> None:
    given = ["evaluation=gptq_old", "seed=7"]
    text = evaluated(tmp_path, *given, c4_validation=LONG)["c4"]
    # random.seed(0), randint(0, 3) for the row and, if it has more than 4 tokens, randint(0, n - 5)
    # for the start: row 3 at 1; row 0 is short; row 2 at 0; row 3 at 1; row 3 at 1; row 1 at 4.
    assert ids(text.windows[:5]) == [
        [90, 91, 92, 93], [1, 80, 81, 82], [90, 91, 92, 93], [90, 91, 92, 93], [73, 74, 75, 76],
    ]  # fmt: skip
    assert ids(text.windows) == drawn(LONG, 256, seed=0)
    assert (text.cut, len(text.windows)) == ("sampled", 256)


def test_wanda_reads_llama_2_at_4096_tokens_whatever_the_models_seqlen(tmp_path: Path) -> None:
    row = "-".join(["7"] * (2 * 4096 - 1))
    texts = evaluated(
        tmp_path, "evaluation=wanda_llama2", wikitext2_test=[row], c4_validation=[row, row]
    )
    assert list(texts) == ["wikitext2", "c4"]
    assert [len(window) for window in texts["wikitext2"].windows] == [4096, 4096]
    assert texts["wikitext2"].dropped_tokens == 0  # BOS makes it whole
    # BOS, 8,191 words, a space, 8,191 words: 4 · 4096 exactly.
    assert [len(window) for window in texts["c4"].windows] == [4096] * 4
    assert (texts["c4"].windows[2][:2].tolist(), texts["c4"].dropped_tokens) == ([2, 7], 0)


def test_a_text_of_one_token_less_than_a_window_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has 3 tokens"):
        evaluated(tmp_path, "evaluation=wikitext2", wikitext2_test=["20-21"])
    (text,) = evaluated(tmp_path, "evaluation=wikitext2", wikitext2_test=["20-21-22"]).values()
    assert ids(text.windows) == [[1, 20, 21, 22]]


# What is calibrated on


def drawn(rows: Sequence[str], count: int, seed: int) -> list[list[int]]:
    """Draw as the published loaders do, call by call, from rows that begin with BOS."""
    random.seed(seed)
    windows = []
    for _ in range(count):
        while True:
            words = rows[random.randint(0, len(rows) - 1)].split("-")
            text = [1, *map(int, words)]
            if len(text) > 4:
                break
        start = random.randint(0, len(text) - 4 - 1)
        windows.append(text[start : start + 4])
    return windows


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        # As above, and then row 1 at 2.
        (0, [[90, 91, 92, 93], [1, 80, 81, 82], [90, 91, 92, 93], [90, 91, 92, 93],
             [73, 74, 75, 76], [71, 72, 73, 74]]),
        # Row 1 at 4; row 0 is short; row 2 at 0; row 3 at 1, 2 and 0; row 0 again; row 3 at 0.
        (1, [[73, 74, 75, 76], [1, 80, 81, 82], [90, 91, 92, 93], [91, 92, 93, 94],
             [1, 90, 91, 92], [1, 90, 91, 92]]),
    ],
)  # fmt: skip
def test_c4_is_drawn_from_rows_longer_than_a_window(
    seed: int, expected: list[list[int]], tmp_path: Path
) -> None:
    assert calibrated(tmp_path, "dataset=c4", f"seed={seed}") == expected
    many = calibrated(tmp_path, "dataset=c4", f"seed={seed}", "dataset.nsamples=200")
    assert many == drawn(LONG, 200, seed)
    assert all(60 not in window for window in many)


@pytest.mark.parametrize(
    ("corpus", "separator", "starts", "text"),
    [
        # SparseGPT and Wanda: joined with a space, the blank row too. 12 tokens: randint(0, 7).
        ("wikitext2", " ", [6, 6, 0, 4, 7, 6], [1, 10, 11, 12, 2, 2, 13, 14, 2, 15, 16, 17]),
        # GPTQ: with a blank line. 15 tokens: randint(0, 10).
        ("wikitext2", "\n\n", [6, 6, 0, 4, 8, 7],
         [1, 10, 11, 12, 3, 3, 3, 3, 13, 14, 3, 3, 15, 16, 17]),
        # SparseGPT, and GPTQ's new loader. 14 tokens: randint(0, 9).
        ("ptb", " ", [6, 6, 0, 4, 8, 7], [1, 30, 31, 2, 32, 2, 33, 34, 35, 2, 36, 37, 38, 39]),
        # GPTQ's old one. 17 tokens: randint(0, 12).
        ("ptb", "\n\n", [6, 12, 6, 0, 4, 8],
         [1, 30, 31, 3, 3, 32, 3, 3, 33, 34, 35, 3, 3, 36, 37, 38, 39]),
    ],
)  # fmt: skip
def test_running_text_is_cut_at_starts_of_pythons_generator(
    corpus: str, separator: str, starts: list[int], text: list[int], tmp_path: Path
) -> None:
    given = [f"dataset={corpus}"]
    given += [] if separator == " " else ['dataset.separator="\n\n"']
    assert calibrated(tmp_path, *given) == [text[start : start + 4] for start in starts]
    # The last possible start is excluded, so the last token is never seen.
    many = calibrated(tmp_path, *given, "dataset.nsamples=300")
    assert {tuple(window) for window in many} == {
        tuple(text[start : start + 4]) for start in range(len(text) - 4)
    }


def test_a_line_break_that_the_shell_left_as_two_letters_is_refused() -> None:
    with pytest.raises(InputError, match=r"dataset\.separator=.* is not allowed: .*line break"):
        configure("dataset=wikitext2", 'dataset.separator="\\n\\n"')
    with pytest.raises(InputError, match=r"evaluation\.datasets\.ptb\.separator=.*line break"):
        configure("evaluation=ptb", 'evaluation.datasets.ptb.separator="\\n\\n"')


def test_a_row_of_one_token_more_than_a_window_gives_its_beginning(tmp_path: Path) -> None:
    windows = calibrated(tmp_path, "dataset=c4", c4_train=["60-61-62", "80-81-82-83"])
    assert windows == [[1, 80, 81, 82]] * 6
    with pytest.raises(InputError, match="the longest has 4"):
        calibrated(tmp_path, "dataset=c4", c4_train=["60-61-62", "63-64-65"])


def test_the_seed_of_the_run_draws_calibration_and_no_evaluation(tmp_path: Path) -> None:
    seeds = [calibrated(tmp_path, "dataset=c4", f"seed={seed}") for seed in (0, 1)]
    assert seeds[0] != seeds[1]
    assert calibrated(tmp_path, "dataset=c4", "seed=1", "dataset.seed=0") == seeds[0]
    for seed in (0, 1):
        text = evaluated(tmp_path, "evaluation=gptq_old", f"seed={seed}", c4_validation=LONG)["c4"]
        assert ids(text.windows) == drawn(LONG, 256, seed=0)


# The beginning token


@pytest.mark.parametrize(
    ("tokenizer", "policy", "first"),
    [
        (TOKENIZER, "auto", [1, 50, 51, 2]),  # LLaMA
        (BARE, "auto", [50, 51, 2, 52]),  # GPT-2
        (BARE, "always", [1, 50, 51, 2]),  # OPT, whose slow tokenizer the tables are of
        (TOKENIZER, "never", [50, 51, 2, 52]),
    ],
)
def test_a_text_begins_as_its_tokenizer_or_the_protocol_says(
    tokenizer: PreTrainedTokenizerFast, policy: str, first: list[int], tmp_path: Path
) -> None:
    given = ["evaluation=ptb", f"evaluation.datasets.ptb.add_bos={policy}"]
    (text,) = evaluated(tmp_path, *given, tokenizer=tokenizer).values()
    assert text.windows[0].tolist() == first
    assert text.bos is (first[0] == 1)
    assert all(1 not in window for window in text.windows[1:])
    # Of one row with more than 4 tokens, with BOS or without it, the start 0 is the first that is.
    given = ["dataset=c4", f"dataset.add_bos={policy}", "dataset.nsamples=40"]
    row = {"c4_train": ["50-51-52-53-54-55"]}
    windows = calibrated(tmp_path, *given, tokenizer=tokenizer, **row)
    assert min(windows) == ([1, 50, 51, 52] if text.bos else [50, 51, 52, 53])
    assert len({*map(tuple, windows)}) == (3 if text.bos else 2)


# Which table is of which protocol

NEW = {
    "wikitext2": ("test", "\n\n", None, None),
    "ptb": ("test", " ", None, None),
    "c4": ("validation", " ", 1100, 256),
}
WITHOUT_PTB = {name: read for name, read in NEW.items() if name != "ptb"}
TABLES = {
    # corpus, separator, nsamples, seqlen; protocol, and what of each text
    "sparsegpt": ("c4", None, 128, 2048, "sparsegpt", NEW),
    "gptq": ("c4", None, 128, 2048, "sparsegpt", NEW),
    "besa": ("c4", None, 128, 2048, "sparsegpt", NEW),
    "obr": ("c4", None, 128, 2048, "sparsegpt", NEW),
    "slim_llm": ("wikitext2", " ", 128, 2048, "sparsegpt", NEW),
    "wanda": ("c4", None, 128, 4096, "wanda_llama2", WITHOUT_PTB),
}


@pytest.mark.parametrize("table", TABLES)
def test_a_table_is_run_as_its_paper_was(table: str) -> None:
    corpus, separator, nsamples, seqlen, protocol, texts = TABLES[table]
    row = next(row for row in find_rows(f"papers/{table}", None) if not row.endswith("dense"))
    config = from_hydra(compose_row(row, []))
    drawn_from = config.dataset
    assert (drawn_from.corpus, drawn_from.split) == (corpus, "train")
    assert (drawn_from.separator, drawn_from.sampling.name) == (separator, "published")
    assert (drawn_from.nsamples, drawn_from.seqlen, drawn_from.seed) == (nsamples, seqlen, 0)
    assert config.evaluation.protocol == protocol
    read = config.evaluation.datasets
    assert {
        n: (t.split, t.separator, t.first_rows, t.max_windows) for n, t in read.items()
    } == texts
    assert {(t.windows.name, t.seqlen) for t in read.values()} == {("joined", seqlen)}
    # The published code loads slow tokenizers, which begin with one BOS.
    assert {drawn_from.add_bos.name, *(t.add_bos.name for t in read.values())} == {"always"}


# What is summed


def test_perplexity_is_the_published_sum_of_shifted_windows() -> None:
    """Each window predicts all its tokens but the first; means are weighted by the window."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    settings = LlamaConfig(vocab_size=50, num_hidden_layers=1, **shape)
    model = LlamaForCausalLM(settings).double().eval()
    windows = [torch.randint(50, (7,)) for _ in range(5)]
    total = 0.0
    with torch.no_grad():
        for window in windows:
            logits = model(window[None]).logits[0]
            total += torch.nn.functional.cross_entropy(logits[:-1], window[1:]).item() * 7
    measured = measure_perplexity(Walker(model), windows, batch_tokens=14, logits_chunk=5)
    assert measured.value == pytest.approx(math.exp(total / (5 * 7)), rel=1e-12)
