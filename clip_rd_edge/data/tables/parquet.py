"""Tables in Parquet, read through pyarrow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_rd_edge.data.tables.blocks import (
    CAPTION_OPTION,
    IMAGE_OPTION,
    Block,
    Fault,
    PairFinder,
    numbered,
    require_columns,
)
from clip_rd_edge.data.tables.packed import Pair, pack
from clip_rd_edge.errors import InputError, MissingExtraError, first_line
from clip_rd_edge.utils.structs import is_list_of_texts

_SUFFIX, _MAGIC = ".parquet", b"PAR1"
_BLOCK_ROWS = 1 << 14


@dataclass(frozen=True)
class ParquetTable:
    """A Parquet file; implements `Table`. Its blocks are Arrow record batches, which are read in order."""

    path: Path
    image_key: str
    caption_key: str
    rows: int
    unit: str = "row"

    @property
    def count(self) -> int:
        """See `Table`."""
        return -(-self.rows // _BLOCK_ROWS)

    def places(self) -> Iterator[Any]:
        """See `Table`."""
        pyarrow, parquet = _import_pyarrow(self.path)
        # Neither threads nor reading ahead: memory stays bounded, and processes can be forked.
        try:
            with parquet.ParquetFile(self.path, memory_map=True) as file:
                yield from file.iter_batches(
                    _BLOCK_ROWS, columns=list({self.image_key, self.caption_key}), use_threads=False
                )
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(f"{self.path} is damaged: {first_line(error)}.") from error

    def read(self, place: Any) -> Block:
        """See `Table`."""
        finder = PairFinder(self.path, self.caption_key)
        columns = [place.column(key) for key in (self.image_key, self.caption_key)]
        try:
            names, captions = (column.to_pylist() for column in columns)
        except UnicodeDecodeError:
            return Block(pack([]), [], 0, fault=_text_fault(columns))
        pairs, left_out = list[Pair](), list[tuple[int, str]]()
        for number, (name, caption) in enumerate(zip(names, captions, strict=True), 1):
            pair = finder.pair(name or "", caption or "")
            if isinstance(pair, str):
                left_out.append((number, pair))
            else:
                pairs.append(pair)
        return Block(pack(pairs), left_out, len(names))

    def in_order(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """See `Table`."""
        rows = 0
        for block in blocks:
            yield numbered(block, rows)
            rows += block.count


def is_parquet(path: Path) -> bool:
    """Return whether a file is Parquet by its name or, as pandas' usual `pairs.parquet.gzip`, by its first bytes."""
    if path.suffix.lower() == _SUFFIX:
        return True
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def open_parquet(path: Path, image_key: str, caption_key: str) -> ParquetTable:
    """Check that the columns are there and hold text; raises InputError if not."""
    rows = _rows_with(path, {image_key: IMAGE_OPTION, caption_key: CAPTION_OPTION})
    return ParquetTable(path, image_key, caption_key, rows)


def read_column(name: str, column: str) -> list[str]:
    """Return the texts of a column of captions, without empty ones."""
    path = Path(name)
    _rows_with(path, {column: CAPTION_OPTION})
    pyarrow, parquet = _import_pyarrow(path)
    try:
        cells = parquet.read_table(path, columns=[column], use_threads=False).column(column)
        values = cells.to_pylist()
    except UnicodeDecodeError as error:
        fault = _text_fault([cells])
        raise InputError(f"{path}, row {fault.number}: {fault.reason}.", hint=fault.hint) from error
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path} is damaged: {first_line(error)}.") from error
    texts = [value.strip() for value in values if value and value.strip()]
    if lists := [text for text in texts if is_list_of_texts(text)]:
        raise InputError(
            f"{path} has a list in its column {column!r}: {lists[0]!r}; expected one row per caption.",
            hint="write each caption into a row of its own",
        )
    if not texts:
        raise InputError(f"{path} has no text in its column {column!r}.", hint=f"name the column with {CAPTION_OPTION}")
    return texts


def _text_fault(columns: Sequence[Any]) -> Fault:
    """Return the first row of Arrow columns whose text is not UTF-8, which not all that write Parquet check."""
    rows = enumerate(zip(*columns, strict=True), 1)
    number = next(number for number, cells in rows if not all(map(_is_utf_8, cells)))
    return Fault(number, "it is not UTF-8 text", "save the table as UTF-8")


def _is_utf_8(cell: Any) -> bool:
    try:
        cell.as_py()
    except UnicodeDecodeError:
        return False
    return True


def _rows_with(path: Path, columns: Mapping[str, str]) -> int:
    """Return the number of rows of a file that has these columns of text, by name the options that name them."""
    pyarrow, parquet = _import_pyarrow(path)
    try:
        with parquet.ParquetFile(path, memory_map=True) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path} is not a Parquet file: {first_line(error)}.") from error
    require_columns(path, schema.names, columns)
    # The last is missing from older releases of pyarrow.
    names = ("is_string", "is_large_string", "is_string_view")
    texts = [getattr(pyarrow.types, name) for name in names if hasattr(pyarrow.types, name)]
    for key, option in columns.items():
        kind = schema.field(key).type
        content = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if not any(is_text(content) for is_text in texts):
            has_images = option == IMAGE_OPTION and "binary" in str(kind)  # in a struct, in Hugging Face's data sets
            raise InputError(
                f"{path}: the column {key!r} holds {kind}; expected text, for images the paths of files.",
                hint=f"name a column of text with {option}"
                + (", or write the images of this one into files or WebDataset shards" if has_images else ""),
            )
    count: int = rows
    return count


def _import_pyarrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise MissingExtraError("pyarrow", extra="parquet", purpose=f"Reading {path}") from error
    return pyarrow, pyarrow.parquet
