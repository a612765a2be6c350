"""Source files -> Example, checked: whatever is wrong with a file is one line that names file, line and field.

| source              | stream      | file                  | fields                                        |
|---------------------|-------------|-----------------------|-----------------------------------------------|
| answer_carefully    | safety      | JSON, JSONL, parquet  | ID, text, output (v3: output-sample), meta    |
| borderline          | borderline  | JSON, JSONL, parquet  | ID, text, output (v3: output-sample), meta    |
| llm_jp_instructions | helpfulness | JSON, JSONL, parquet  | ID, text, output                              |
| ichikara            | helpfulness | JSON, JSONL           | ID, text, output                              |
| elyza_tasks_100     | helpfulness | CSV                   | input, output, eval_aspect                    |
| (a path alone)      | its field   | JSONL of kaja's own   | id, source, stream, question, answer, ...     |

The ending of a file says its format, whatever the source.
"""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kaja.errors import UserError
from kaja.files import read_json, read_jsonl, read_text
from kaja.rubric import STREAMS

Record = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """A question with its reference answer, wherever it came from."""

    id: str
    source: str
    stream: str  # one of STREAMS: which rubric and which prompts it gets
    question: str
    reference: str = ""  # `answer` in kaja's own files: the target of SFT, the judge's reference answer
    eval_aspect: str = ""  # what the judge looks for in this very question
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """Which field of a record is what."""

    stream: str
    id: str  # "" where records have none: they are numbered from 1
    question: str
    references: tuple[str, ...]  # the first that a record has
    eval_aspect: str = ""


SOURCES = {
    "answer_carefully": Source("safety", "ID", "text", ("output", "output-sample")),
    "borderline": Source("borderline", "ID", "text", ("output", "output-sample")),
    "llm_jp_instructions": Source("helpfulness", "ID", "text", ("output",)),
    "ichikara": Source("helpfulness", "ID", "text", ("output",)),
    "elyza_tasks_100": Source("helpfulness", "", "input", ("output",), "eval_aspect"),
}


def load_examples(spec: str) -> list[Example]:
    """The examples of "source=path", or of a bare path to kaja's own JSONL.

    Raises UserError for the first record that does not fit, for an id that occurs twice, and for a file
    without records.
    """
    name, path = parse_spec(spec)
    examples: list[Example] = []
    places: dict[str, str] = {}
    for place, record in read_records(path):
        if name:
            example = from_source(record, name, SOURCES[name], place, number=len(examples) + 1)
        else:
            example = from_own(record, place)
        if example.id in places:
            raise UserError(
                f"{place}: id {example.id!r} is also that of {places[example.id]}; "
                "ids are unique within a file; rename or remove one"
            )
        places[example.id] = place
        examples.append(example)
    if not examples:
        raise UserError(f"{path}: holds no records; a data file needs at least one; check that it is the right file")
    return examples


def load_all(specs: Sequence[str]) -> list[Example]:
    """The examples of several files, one after the other."""
    if not specs:
        raise UserError("no data file: at least one is needed; name a file, or SOURCE=FILE")
    return [example for spec in specs for example in load_examples(spec)]


def to_record(example: Example) -> Record:
    """One line of kaja's own JSONL; `load_examples` makes the same Example of it."""
    return {
        "id": example.id,
        "source": example.source,
        "stream": example.stream,
        "question": example.question,
        "answer": example.reference,
        "eval_aspect": example.eval_aspect,
        "meta": example.meta,
    }


def parse_spec(spec: str) -> tuple[str, Path]:
    """("source" or "", path); what stands before the first "=" is a source if it could be a name at all."""
    name, equals, path = spec.partition("=")
    if not equals or not name.isidentifier():
        return "", Path(spec)
    if name not in SOURCES:
        raise UserError(
            f"{spec}: unknown source {name!r}; choose one of {', '.join(SOURCES)}, "
            "or give a bare path for kaja's own JSONL"
        )
    if not path:
        raise UserError(f"{spec}: no path after '='; write {name}=path/to/file")
    return name, Path(path)


def from_source(record: Record, name: str, source: Source, place: str, number: int) -> Example:
    reference = next((key for key in source.references if key in record), source.references[0])
    used = {source.id, source.question, reference, source.eval_aspect}
    meta: Record = {}
    for key, value in record.items():
        if key == "meta" and isinstance(value, dict):
            meta.update(value)
        elif key not in used:
            meta[key] = value
    return Example(
        id=identifier(record, source.id, place) if source.id else str(number),
        source=name,
        stream=source.stream,
        question=text_field(record, source.question, place),
        reference=text_field(record, reference, place),
        eval_aspect=text_field(record, source.eval_aspect, place) if source.eval_aspect else "",
        meta=meta,
    )


def from_own(record: Record, place: str) -> Example:
    stream = text_field(record, "stream", place)
    if stream not in STREAMS:
        raise UserError(f"{place}: stream is {stream!r}; it must be one of {', '.join(STREAMS)}; mend the line")
    meta = record.get("meta", {})
    if not isinstance(meta, dict):
        raise UserError(f"{place}: field 'meta' is {kind_of(meta)}; it must be a JSON object; mend or remove it")
    return Example(
        id=identifier(record, "id", place),
        source=text_field(record, "source", place),
        stream=stream,
        question=text_field(record, "question", place),
        reference=text_field(record, "answer", place, optional=True),
        eval_aspect=text_field(record, "eval_aspect", place, optional=True),
        meta=meta,
    )


def identifier(record: Record, name: str, place: str) -> str:
    value = record.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return text_field(record, name, place)


def text_field(record: Record, name: str, place: str, optional: bool = False) -> str:
    """A field that must be text and, unless optional, not blank."""
    if name not in record:
        if optional:
            return ""
        raise UserError(
            f"{place}: no field {name!r} (there are {', '.join(map(str, record)) or 'none'}); "
            "every record needs it; add it, or name the source that the file really is"
        )
    value = record[name]
    if not isinstance(value, str):
        raise UserError(f"{place}: field {name!r} is {kind_of(value)}; it must be text; put it into quotes")
    if not value.strip() and not optional:
        raise UserError(f"{place}: field {name!r} is empty; every record needs it; fill it in or remove the record")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"{place}: field {name!r} holds half of a surrogate pair, which is no text; write the file again as UTF-8"
        ) from None
    return value


def kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null", str: "text"}
    return names.get(type(value), "a number")


def read_records(path: Path) -> Iterator[tuple[str, Record]]:
    """(where it is, record) for every record; the ending of the path says the format."""
    readers: dict[str, Callable[[Path], Iterator[tuple[str, Record]]]] = {
        ".json": read_json_records,
        ".jsonl": read_jsonl_records,
        ".csv": read_csv_records,
        ".parquet": read_parquet_records,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"{path}: ends with {path.suffix or 'nothing'!r}; data files end with {', '.join(readers)}; rename it"
        )
    return reader(path)


def read_json_records(path: Path) -> Iterator[tuple[str, Record]]:
    records = read_json(path)
    if not isinstance(records, list):
        raise UserError(f"{path}: holds {kind_of(records)}; it must be a JSON array of objects; wrap it in [ ]")
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise UserError(
                f"{path}, record {number}: is {kind_of(record)}; every record is an object {{...}}; mend or remove it"
            )
        yield f"{path}, record {number}", record


def read_jsonl_records(path: Path) -> Iterator[tuple[str, Record]]:
    for number, record in read_jsonl(path):
        yield f"{path}, line {number}", record


def read_csv_records(path: Path) -> Iterator[tuple[str, Record]]:
    # Spreadsheets write a byte order mark in front.
    text = read_text(path).removeprefix("\ufeff")
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(rows, [])
        line = rows.line_num + 1  # where the next row begins; a quoted cell may span lines
        for row in rows:
            if row and len(row) != len(header):
                raise UserError(
                    f"{path}, line {line}: {len(row)} cells where the header has {len(header)}; "
                    "quote cells that hold commas or line breaks"
                )
            if row:
                yield f"{path}, line {line}", dict(zip(header, row))
            line = rows.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}, line {rows.line_num}: not valid CSV ({error}); quote cells that hold commas or line breaks"
        ) from None


def read_parquet_records(path: Path) -> Iterator[tuple[str, Record]]:
    pyarrow, parquet = import_pyarrow(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the path of an existing file")
    try:
        records = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable parquet file ({reason}); download or write it again") from None
    for number, record in enumerate(records, start=1):
        yield f"{path}, record {number}", record


def import_pyarrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path}: reading parquet needs pyarrow, which is not installed; "
            "`pip install 'kaja[data]'`, or convert the file to JSONL"
        ) from None
    return pyarrow, pyarrow.parquet
