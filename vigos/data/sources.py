"""Open raw records: JSONL, JSON and Parquet files, folders, `datasets`, lists. Nothing is decoded.

JSONL is read by offsets here and not by `datasets`, whose reader fails on the whole file for one malformed line, for an
answer that is a number in one line and text in the next, and for columns that come late; here each costs one example.
Parquet, saved folders and hub names go through `datasets`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")


class Records(Protocol):
    """Raw records by number."""

    columns: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class _Lines:
    """A JSONL file read line by line at remembered offsets, 8 bytes of memory a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offsets, position = array("q"), 0
        with path.open("rb") as file:
            for line in file:
                if line.strip():
                    self.offsets.append(position)
                position += len(line)
        self.columns = _columns_of(_json_object(line) for _, line in zip(range(100), _stripped(path), strict=False))

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> Any:
        with self.path.open("rb") as file:
            file.seek(self.offsets[index])
            return _json_object(file.readline())


class _Listed:
    """Records that are in memory already."""

    def __init__(self, records: Sequence[Any]) -> None:
        self.records = records
        self.columns = _columns_of(records[:100])

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        return self.records[index]


class Head:
    """The first records of others."""

    def __init__(self, records: Records, count: int) -> None:
        self.records, self.count, self.columns = records, count, records.columns

    def __len__(self) -> int:
        return min(self.count, len(self.records))

    def __getitem__(self, index: int) -> Any:
        return self.records[index]


class _HubTable:
    """A `datasets.Dataset` read as Arrow: its Image features stay bytes or paths, and decoding is bounded here."""

    def __init__(self, table: Any) -> None:
        self.table, self.columns = table.with_format("arrow"), list(table.column_names)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Any:
        return self.table[index].to_pylist()[0]


class _LineStream:
    """The lines of a JSONL file from the start, each time it is iterated."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[Any]:
        return map(_json_object, _stripped(self.path))


def _stripped(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from (line for line in file if line.strip())


def _json_object(line: bytes) -> Any:
    """Return the parsed line, or its error in its place: one bad line costs one example."""
    try:
        return json.loads(line)
    except RecursionError:
        return ValueError("nested too deeply")
    except ValueError as error:  # not JSON, or not UTF-8
        return error


def _columns_of(records: Any) -> list[str]:
    """Return field names in order of appearance; the first record need not have them all."""
    return list(dict.fromkeys(name for record in records if isinstance(record, Mapping) for name in record))


@dataclass(frozen=True)
class Opened:
    """An open source of examples.

    Attributes:
        records: `Records`, or for a stream an iterable of raw records.
        columns: names in order of appearance.
        root: folder that paths are relative to; None where there is none.
        shards: a stream that divides itself among the workers of a data loader.
    """

    records: Any
    columns: list[str]
    root: Path | None = None
    shards: bool = False


def name_of(source: Any) -> str:
    """Return the name that errors use for `source`."""
    return str(source) if isinstance(source, str | Path) else f"the {type(source).__name__}"


def open_source(source: Any, split: str, streaming: bool) -> Opened:
    """Open what `load_rows` takes; raises ValueError for anything else."""
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.is_dir():
            return _open_folder(path, split, streaming)
        if path.is_file():
            return _open_file(path, streaming)
        name = str(source)
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+|\w[\w-]*", name) and path.suffix.lower() not in _SUFFIXES:
            return _open_hub(name, split, streaming)
        raise ValueError(f"the data must be a file, a folder or the name of a dataset; there is no {name!r}")
    if isinstance(source, Sequence):
        listed = _Listed(source)
        return Opened(listed, listed.columns)
    if type(source).__module__.split(".")[0] == "datasets":
        return _open_table(source, split, None, streaming)
    raise ValueError(
        "the data must be a path, the name of a dataset, a datasets.Dataset or a list of dicts, "
        f"got {type(source).__name__}"
    )


def _open_file(path: Path, streaming: bool) -> Opened:
    kind = path.suffix.lower()
    if kind in _SUFFIXES[:2]:
        if streaming:
            columns = _columns_of(_json_object(line) for _, line in zip(range(100), _stripped(path), strict=False))
            return Opened(_LineStream(path), columns, path.parent)
        lines = _Lines(path)
        return Opened(lines, lines.columns, path.parent)
    if kind == ".json":
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(
                f"{path} is not one JSON document ({error}); one object a line belongs in .jsonl"
            ) from error
        if isinstance(content, dict):  # {"data": [...]}
            lists = [value for value in content.values() if isinstance(value, list)]
            content = lists[0] if len(lists) == 1 else content
        if not isinstance(content, list):
            raise ValueError(f"{path} must hold a list of objects, got {type(content).__name__}")
        listed = _Listed(content)
        return Opened(listed, listed.columns, path.parent)
    if kind == ".parquet":
        return _open_parquet([path], path.parent, streaming)
    raise ValueError(f"the data must end in .jsonl, .json or .parquet or be a folder, got {path}")


def _open_folder(path: Path, split: str, streaming: bool) -> Opened:
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        from datasets import load_from_disk

        return _open_table(load_from_disk(str(path)), split, path, streaming)
    for name in (f"{split}/metadata.jsonl", "metadata.jsonl", f"{split}.jsonl", f"{split}.json"):
        if (path / name).is_file():
            return _open_file(path / name, streaming)
    for folder, pattern in ((path, f"{split}*.parquet"), (path / "data", f"{split}*.parquet"), (path, "*.parquet")):
        files = sorted(folder.glob(pattern))
        if files:
            return _open_parquet(files, path, streaming)
    raise ValueError(
        f"{path} holds no dataset: wanted metadata.jsonl, {split}.jsonl, Parquet files or a folder that `datasets` "
        f"saved, found {', '.join(sorted(p.name for p in path.iterdir())[:8]) or 'nothing'}"
    )


def _open_parquet(files: list[Path], root: Path, streaming: bool) -> Opened:
    from datasets import load_dataset

    name, paths = f"default-{_identity(files)}", [str(f) for f in files]
    table = load_dataset("parquet", name, data_files=paths, split="train", streaming=streaming)
    return _open_table(table, "train", root, streaming)


def _identity(files: list[Path]) -> str:
    """Digest what tells a Parquet file from the one it replaced: `datasets` keeps rows by path and time stamp alone.

    The time at which the file system changed the entry cannot be set; the end of the file holds its statistics.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path in files:
        facts = path.stat()
        with path.open("rb") as file:
            file.seek(-min(facts.st_size, 2**16), os.SEEK_END)
            digest.update(f"{facts.st_size} {facts.st_ino} {facts.st_mtime_ns} {facts.st_ctime_ns}".encode())
            digest.update(file.read())
    return digest.hexdigest()


def _open_hub(name: str, split: str, streaming: bool) -> Opened:
    from datasets import load_dataset

    try:
        table = load_dataset(name, split=split, streaming=streaming)
    except (OSError, ValueError) as error:
        raise ValueError(f"there is no file or folder {name!r}, and as a dataset on the hub: {error}") from error
    return _open_table(table, split, None, streaming)


def _open_table(table: Any, split: str, root: Path | None, streaming: bool) -> Opened:
    from datasets import Dataset

    if isinstance(table, dict):  # DatasetDict
        if split not in table:
            raise ValueError(f"split must be one of {', '.join(table)}, got {split!r}")
        table = table[split]
    if isinstance(table, Dataset):
        records = _HubTable(table)
        return Opened(records, records.columns, root)
    if not streaming:
        raise ValueError("source is a stream of `datasets`: pass streaming=True")
    table = table.decode(False)
    columns = table.column_names or _columns_of(record for _, record in zip(range(1), table, strict=False))
    return Opened(table, columns, root, shards=True)
