"""Source files -> Example, checked: whatever is wrong with a file is one line that names file, line and field.

A spec says where the data is and how to read it; the scripts take any number of specs. Quotes keep ? and & from the
shell:

    FILE                                                        JSONL of kaja's own, as synth.py writes it
    SOURCE=FILE                                                 a source that kaja knows, by its columns below
    'NAME=FILE?question=質問&answer=回答&stream=helpfulness'    any file, by a mapping of its columns
    SOURCE=hub://OWNER/NAME/SPLIT                               a dataset of the Hugging Face hub
    'SOURCE=hub://OWNER/NAME/CONFIG/SPLIT?answer=output-sample' its config, and a mapping

| source              | stream      | fields                                                          |
|---------------------|-------------|-----------------------------------------------------------------|
| answer_carefully    | safety      | ID, text, output (v3: output-sample), meta                      |
| borderline          | borderline  | ID, text, output (v3: output-sample), meta                      |
| llm_jp_instructions | helpfulness | ID, text, output                                                |
| ichikara            | helpfulness | ID, text, output                                                |
| elyza_tasks_100     | helpfulness | input, output, eval_aspect; numbered from 1                     |
| (none)              | its field   | kaja's own: id, source, stream, question, answer, ..., meta     |

The ending of a file says its format, whatever the source: .json (an array), .jsonl, .csv or .parquet, all in UTF-8.

A mapping gives `question`, `answer`, `eval_aspect` and `id` the name of a column each, and `stream` one of safety,
borderline, helpfulness. Question and stream are needed unless SOURCE is one of the above, whose columns then count
where the mapping is silent; an empty name ("eval_aspect=") says that there is no such column. Records without ids are
numbered from 1. %26 in a name stands for &, %25 for %. Columns without a role are kept in Example.meta, as JSON.

A hub dataset is downloaded once by `datasets`, to its cache; a local folder OWNER/NAME goes first, as in load_dataset.

A bad record ends the reading, or with `skip_bad` is left out and counted: a line that is no JSON object or not UTF-8, a
row with too few or too many cells, a missing or empty field, text that is none, an id that was there before. What makes
the rest of a file unreadable (broken quotes in a CSV, half a JSON array) always ends it.
"""

import csv
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, time
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np

from kaja.errors import UserError
from kaja.files import BadRecord, OnBad, decoded, invalid_json, raise_bad, read_jsonl, read_lines, read_text
from kaja.rubric import STREAMS

Record = dict[str, Any]

HUB = "hub://"
ROLES = ("question", "answer", "stream", "id", "eval_aspect")
BATCH = 1024  # records of parquet files and hub datasets that are in memory at a time


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
    references: tuple[str, ...]  # the first that a record has; () where there are no answers
    eval_aspect: str = ""


SOURCES = {
    "answer_carefully": Source("safety", "ID", "text", ("output", "output-sample")),
    "borderline": Source("borderline", "ID", "text", ("output", "output-sample")),
    "llm_jp_instructions": Source("helpfulness", "ID", "text", ("output",)),
    "ichikara": Source("helpfulness", "ID", "text", ("output",)),
    "elyza_tasks_100": Source("helpfulness", "", "input", ("output",), "eval_aspect"),
}


@dataclass(frozen=True)
class Spec:
    """Where data is and how to read it."""

    name: str  # Example.source; "" for kaja's own records, which say it themselves
    location: str  # a path, or hub://OWNER/NAME[/CONFIG]/SPLIT
    source: Source | None  # None for kaja's own records


class BadRecords:
    """What becomes of records that do not fit: the first is raised, or all are left out, counted by what is wrong."""

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.total = 0
        self.counts: dict[str, int] = {}
        self.first: dict[str, BadRecord] = {}
        self.last: BadRecord | None = None

    def add(self, error: BadRecord) -> None:
        if not self.skip:
            raise error
        self.total += 1
        self.last = error
        self.counts[error.kind] = self.counts.get(error.kind, 0) + 1
        self.first.setdefault(error.kind, error)

    def lines(self) -> list[str]:
        """One line for each thing that was wrong, the most frequent first."""
        return [
            f"left out {count} record{'s' if count > 1 else ''}: {kind}; first {self.first[kind].place}"
            for kind, count in sorted(self.counts.items(), key=lambda item: -item[1])
        ]


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def load_examples(spec: str, skip_bad: bool = False, report: Callable[[str], None] = to_stderr) -> list[Example]:
    """The examples that a spec stands for.

    Raises UserError for the first record that does not fit, for an id that occurs twice, and for data without
    records. With skip_bad such records are left out, and `report` gets a line for each thing that was wrong with some;
    an error is then only what concerns a whole file, or all of its records.
    """
    return load_all([spec], skip_bad, report)


def load_all(
    specs: Sequence[str], skip_bad: bool = False, report: Callable[[str], None] = to_stderr
) -> list[Example]:
    """The examples of several specs, one after the other; skip_bad and report as in load_examples."""
    if not specs:
        raise UserError("no data file: at least one is needed; name a file, or SOURCE=FILE")
    bad = BadRecords(skip_bad)
    examples = [example for spec in [parse_spec(spec) for spec in specs] for example in read_examples(spec, bad)]
    for line in bad.lines():
        report(line)
    return examples


def read_examples(spec: Spec, bad: BadRecords) -> list[Example]:
    examples: list[Example] = []
    places: dict[str, str] = {}
    bad_before = bad.total
    for place, record in read_records(spec.location, bad.add):
        # Bad records count: leaving some out changes no number.
        number = len(examples) + bad.total - bad_before + 1
        try:
            if spec.source:
                example = from_source(record, spec.name, spec.source, place, number)
            else:
                example = from_own(record, place)
            if example.id in places:
                raise BadRecord(
                    place, f"id {example.id!r} is also that of {places[example.id]}",
                    "ids are unique within a file; rename or remove one", kind="id that was there before",
                )  # fmt: skip
        except BadRecord as error:
            bad.add(error)
            continue
        places[example.id] = place
        examples.append(example)
    if examples:
        return examples
    if bad.total > bad_before:
        raise UserError(
            f"{spec.location}: none of the {bad.total - bad_before} records fits; check that source and columns are "
            f"right; the last is this: {bad.last}"
        )
    raise UserError(
        f"{spec.location}: holds no records; a data file needs at least one; check that it is the right file"
    )


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


def parse_spec(spec: str) -> Spec:
    """What a spec says (see the head of this file); UserError if it says nothing that can be read."""
    named = re.fullmatch(r"([\w-]+)=(.*)", spec, re.DOTALL)
    name, rest = named.groups() if named else ("", spec)
    query = re.search(r"\?(?=[^/?&=]*=)", rest)
    location, columns = rest[: query.start()] if query else rest, mapping(rest[query.end():], spec) if query else {}
    if name and name not in SOURCES and not columns:
        raise UserError(
            f"{spec}: unknown source {name!r}; choose one of {', '.join(SOURCES)}, or name its columns "
            f"('{name}={location or 'FILE'}?question=COLUMN&answer=COLUMN&stream=helpfulness'), "
            "or give a bare path for kaja's own JSONL"
        )
    if not location:
        raise UserError(f"{spec}: no path after '='; write {name or 'NAME'}=path/to/file")
    if location.startswith(HUB):
        hub_parts(location)
    if not columns:
        return Spec(name, location, SOURCES[name] if name else None)
    name = name or (hub_parts(location)[0].split("/")[1] if location.startswith(HUB) else Path(location).stem)
    return Spec(name, location, mapped_source(SOURCES.get(name), columns, spec))


def mapping(query: str, spec: str) -> dict[str, str]:
    """role=column&role=column, checked."""
    columns: dict[str, str] = {}
    for part in query.split("&"):
        role, equals, column = part.partition("=")
        if not equals or role not in ROLES:
            raise UserError(
                f"{spec}: {part!r} is no part of a mapping; parts are ROLE=COLUMN, joined by &, with the roles "
                f"{', '.join(ROLES)}; write %26 for an & in a column's name"
            )
        if role in columns:
            raise UserError(f"{spec}: {role!r} is mapped twice; every role has one column; remove one")
        columns[role] = unquote(column)
    if columns.get("stream", STREAMS[0]) not in STREAMS:
        raise UserError(
            f"{spec}: stream is {columns['stream']!r}; it must be one of {', '.join(STREAMS)}, for all records: "
            "it names no column, but the rubric and prompts that they get"
        )
    if not columns.get("question", "text"):
        raise UserError(f"{spec}: 'question' maps to no column; every record has a question; name its column")
    return columns


def mapped_source(known: Source | None, columns: dict[str, str], spec: str) -> Source:
    """A known source with other columns, or a new one, for which the mapping must say what nothing else says."""
    if known is None:
        for role, values in (("question", "COLUMN"), ("stream", "|".join(STREAMS))):
            if role not in columns:
                raise UserError(
                    f"{spec}: the mapping has no {role!r}, which only the sources {', '.join(SOURCES)} have by "
                    f"themselves; add &{role}={values}"
                )
        known = Source(columns["stream"], "", columns["question"], ())
    answer = columns.get("answer")
    return replace(
        known,
        references=known.references if answer is None else (answer,) if answer else (),
        **{role: column for role, column in columns.items() if role != "answer"},
    )


def hub_parts(location: str) -> tuple[str, str | None, str]:
    """hub://OWNER/NAME[/CONFIG]/SPLIT -> (OWNER/NAME, CONFIG or None, SPLIT)."""
    parts = location.removeprefix(HUB).split("/")
    if len(parts) not in (3, 4) or not all(parts):
        raise UserError(
            f"{location}: a dataset of the hub is {HUB}OWNER/NAME/SPLIT or {HUB}OWNER/NAME/CONFIG/SPLIT; "
            f"write for example {HUB}elyza/ELYZA-tasks-100/test"
        )
    return "/".join(parts[:2]), parts[2] if len(parts) == 4 else None, parts[-1]


def from_source(record: Record, name: str, source: Source, place: str, number: int) -> Example:
    # Parquet and the hub have a null where JSON has no such field.
    reference = next((key for key in source.references if record.get(key) is not None), "".join(source.references[:1]))
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
        reference=text_field(record, reference, place) if reference else "",
        eval_aspect=text_field(record, source.eval_aspect, place) if source.eval_aspect else "",
        meta=json_safe({key: value for key, value in meta.items() if value is not None}),
    )


def from_own(record: Record, place: str) -> Example:
    stream = text_field(record, "stream", place)
    if stream not in STREAMS:
        raise BadRecord(
            place, f"stream is {stream!r}", f"it must be one of {', '.join(STREAMS)}; mend the line",
            kind="stream that is none",
        )  # fmt: skip
    meta = record.get("meta", {})
    if not isinstance(meta, dict):
        raise BadRecord(place, f"field 'meta' is {kind_of(meta)}", "it must be a JSON object; mend or remove it")
    return Example(
        id=identifier(record, "id", place),
        source=text_field(record, "source", place),
        stream=stream,
        question=text_field(record, "question", place),
        reference=text_field(record, "answer", place, optional=True),
        eval_aspect=text_field(record, "eval_aspect", place, optional=True),
        meta=json_safe(meta),
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
        raise BadRecord(
            place, f"no field {name!r} (there are {', '.join(map(str, record)) or 'none'})",
            "every record needs it; add it, or name the source or the columns that the data really has",
            kind=f"no field {name!r}",
        )  # fmt: skip
    value = record[name]
    if not isinstance(value, str):
        raise BadRecord(place, f"field {name!r} is {kind_of(value)}", "it must be text; put it into quotes")
    if not value.strip() and not optional:
        raise BadRecord(place, f"field {name!r} is empty", "every record needs it; fill it in or remove the record")
    if not is_text(value):
        raise BadRecord(
            place, f"field {name!r} holds half of a surrogate pair", "which is no text; write the file again as UTF-8"
        )
    return value


def is_text(value: str) -> bool:
    """Whether UTF-8 can hold it: JSON escapes can say half of a surrogate pair."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null", str: "text"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"of type {type(value).__name__}")


def json_safe(value: Any) -> Any:
    """The value as JSON and UTF-8 can hold it: dates as ISO 8601, NaN and infinities as null, anything else as text."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return value if is_text(value) else value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {json_safe(str(key)): json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    if isinstance(value, np.ndarray | np.number | np.bool_):
        return json_safe(value.tolist())
    if isinstance(value, date | time):
        return value.isoformat()
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


Reader = Callable[[Path, OnBad], Iterator[tuple[str, Record]]]


def read_records(location: str | Path, on_bad: OnBad = raise_bad) -> Iterator[tuple[str, Record]]:
    """(where it is, record) for every record of a file, whose ending says the format, or of a hub dataset."""
    if str(location).startswith(HUB):
        return read_hub_records(str(location))
    readers: dict[str, Reader] = {
        ".json": read_json_records,
        ".jsonl": read_jsonl_records,
        ".csv": read_csv_records,
        ".parquet": read_parquet_records,
    }
    path = Path(location)
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"{path}: ends with {path.suffix or 'nothing'!r}; data files end with {', '.join(readers)}; rename it"
        )
    return reader(path, on_bad)


def read_json_records(path: Path, on_bad: OnBad = raise_bad) -> Iterator[tuple[str, Record]]:
    """The objects of a JSON array, one at a time, with the lines that they begin on."""
    text = read_text(path)
    position = after_spaces(text, 0)
    if not text.startswith("[", position):
        raise no_array(path, text)
    decoder = json.JSONDecoder()
    number = counted = 0
    line = 1
    position = after_spaces(text, position + 1)
    closed = text.startswith("]", position)
    try:
        while not closed:
            record, end = decoder.raw_decode(text, position)
            number += 1
            line += text.count("\n", counted, position)
            counted = position
            place = f"{path}, record {number} (line {line})"
            if isinstance(record, dict):
                yield place, record
            else:
                on_bad(BadRecord(
                    place, f"is {kind_of(record)}", "every record is an object {...}; mend or remove it",
                    kind="no object",
                ))  # fmt: skip
            position = after_spaces(text, end)
            closed = text.startswith("]", position)
            if not closed and not text.startswith(",", position):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
            position = after_spaces(text, position + 1)
        if not number:
            position = after_spaces(text, position + 1)
        if position < len(text):
            raise json.JSONDecodeError("Extra data", text, position)
    except (ValueError, RecursionError) as error:
        raise invalid_json(path, error) from None


SPACES = re.compile(r"[ \t\n\r]*")


def after_spaces(text: str, position: int) -> int:
    match = SPACES.match(text, position)
    return match.end() if match else position


def no_array(path: Path, text: str) -> UserError:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            return UserError(f"{path}: holds one value after the other; such a file is JSON Lines; rename it to .jsonl")
        return invalid_json(path, error)
    return UserError(f"{path}: holds {kind_of(content)}; it must be a JSON array of objects; wrap it in [ ]")


def read_jsonl_records(path: Path, on_bad: OnBad = raise_bad) -> Iterator[tuple[str, Record]]:
    for number, record in read_jsonl(path, on_bad):
        yield f"{path}, line {number}", record


def read_csv_records(path: Path, on_bad: OnBad = raise_bad) -> Iterator[tuple[str, Record]]:
    # As text files are read: a line break in a cell is "\n", whatever system wrote it.
    lines = (decoded(line, path, number).replace("\r\n", "\n") for number, line in read_lines(path))
    rows = csv.reader(lines, strict=True)
    try:
        header = next(rows, [])
        if repeated := {name for name in header if name and header.count(name) > 1}:
            raise UserError(f"{path}, line 1: two columns are called {min(repeated)!r}; names are unique; rename one")
        line = rows.line_num + 1  # where the next row begins; a quoted cell may span lines
        for row in rows:
            place = f"{path}, line {line}"
            if row and len(row) != len(header):
                on_bad(BadRecord(
                    place, f"{len(row)} cells where the header has {len(header)}",
                    "quote cells that hold commas or line breaks", kind="too few or too many cells",
                ))  # fmt: skip
            elif row:
                yield place, dict(zip(header, row))
            line = rows.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}, line {rows.line_num}: not valid CSV ({error}); quote cells that hold commas or line breaks"
        ) from None


def read_parquet_records(path: Path, on_bad: OnBad = raise_bad) -> Iterator[tuple[str, Record]]:
    """A batch of rows in memory at a time. A row can always be read, so on_bad gets none."""
    pyarrow, parquet = import_pyarrow(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the path of an existing file")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, record {number}", record
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable parquet file ({reason}); download or write it again") from None


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


def read_hub_records(location: str) -> Iterator[tuple[str, Record]]:
    number = 0
    for batch in load_hub(location).iter(BATCH):  # {column: values}; far faster than row by row
        for values in zip(*batch.values()):
            number += 1
            yield f"{location}, record {number}", dict(zip(batch, values))


def load_hub(location: str) -> Any:
    """The split as a datasets.Dataset, which stays on disk; UserError says what to do where it cannot be had."""
    datasets = import_datasets(location)
    name, config, split = hub_parts(location)
    try:
        return datasets.load_dataset(name, config, split=split)
    except datasets.exceptions.DatasetNotFoundError as error:
        gated = "is a gated dataset" in str(error)
        what = "is gated, and you have no access yet" if gated else "is not on the hub, or is not open to you"
        raise UserError(
            f"{location}: the dataset {what}; accept its terms at https://huggingface.co/datasets/{name} and "
            f"log in with `hf auth login`{'' if gated else ', if the name is right'}"
        ) from None
    except ConnectionError as error:
        raise UserError(
            f"{location}: the hub cannot be reached, and the dataset is not in the cache ({one_line(error)}); "
            "check the network and HF_HUB_OFFLINE, or download a file of the dataset elsewhere and give its path"
        ) from None
    except ValueError as error:  # no such config or split: the message names those that there are
        raise UserError(f"{location}: {one_line(error)}; write {HUB}{name}[/CONFIG]/SPLIT with what there is") from None
    except (datasets.exceptions.DatasetsError, OSError, RuntimeError) as error:
        reason = one_line(error.__cause__ or error)
        raise UserError(
            f"{location}: `datasets` cannot read it ({reason}); download a file of the dataset and give its path"
        ) from None


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def import_datasets(location: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{location}: reading from the hub needs the package datasets, which is not installed; "
            "`pip install 'kaja[data]'`, or download a file of the dataset and give its path"
        ) from None
    return datasets
