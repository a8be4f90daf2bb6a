"""A small vocabulary for the tokenizers of tiny runs."""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from open_clip.tokenizer import SimpleTokenizer, default_bpe

_VOCABULARY_SIZE = 5_120  # has the words of the tests in one token each
_read_tokenizer = SimpleTokenizer.__init__


@pytest.fixture(scope="session")
def _few_merges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the first of open_clip's 48,894 merges: the tokens beside 256 bytes, twice, and two special ones."""
    path = tmp_path_factory.mktemp("tokenizer") / "merges.txt.gz"
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as merges:
        lines = list(itertools.islice(merges, 1 + _VOCABULARY_SIZE - 2 * 256 - 2))
    path.write_bytes(gzip.compress("".join(lines).rstrip("\n").encode()))
    return path


@pytest.fixture(autouse=True, scope="module")
def small_vocabulary(_few_merges: Path) -> Iterator[None]:
    """Tiny models know the first of CLIP's tokens: all of their embeddings would be most of what is trained and saved.

    A module overrides this where other processes, which know all tokens, train what is made here. Merges are read once,
    which takes a tenth of a tiny run's time, twice in each.
    """
    states: dict[str, dict[str, Any]] = {}

    def init(self: SimpleTokenizer, *args: Any, **options: Any) -> None:
        key = repr((args, sorted(options.items())))
        if key not in states:
            _read_tokenizer(self, *args, **({} if args else {"bpe_path": str(_few_merges)}), **options)
            states[key] = dict(vars(self))
        vars(self).update(states[key], cache=dict(states[key]["cache"]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimpleTokenizer, "__init__", init)
        patch.setattr("clip_rd_edge.models.students.VOCABULARY_SIZE", _VOCABULARY_SIZE)
        yield
