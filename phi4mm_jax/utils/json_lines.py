"""Files of JSON Lines, and remedies for what is given in their place."""

import re
from pathlib import Path

from phi4mm_jax.errors import InputError

BEGINNING = 4096  # bytes by which other files are known
_BINARY = {  # how files begin
    b"\x1f\x8b": "is compressed by gzip; unpack it (gunzip -k FILE)",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd; unpack it (zstd -d FILE)",
    b"BZh": "is compressed by bzip2; unpack it (bunzip2 -k FILE)",
    b"PK\x03\x04": "is a zip file; unpack it",
    b"PAR1": "is Parquet, which training takes by the ending .parquet, and infer.ray",
    b"ARROW1": "is an Arrow file; give the folder that Dataset.save_to_disk has written",
}
_TEXT = {
    re.compile(rb"\[\s*([\r\n{]|$)"): "is one JSON array; write its objects as lines: jq -c '.[]' FILE > FILE.jsonl",
    re.compile(rb'\{\s*[\r\n]\s*"'): "has objects over several lines; write each on one: jq -c . FILE > FILE.jsonl",
}
_TABLES = {".csv", ".tsv", ".xlsx", ".xls"}


def check_json_lines(path: Path, beginning: bytes) -> None:
    """Refuse a file whose beginning or name is not that of JSON Lines.

    Args:
        beginning: its first bytes, `BEGINNING` or all.

    Raises:
        InputError: it is compressed, a table, or JSON in another form; it says how to make lines of it.
    """
    found = next((remedy for magic, remedy in _BINARY.items() if beginning.startswith(magic)), None)
    text = beginning.removeprefix(b"\xef\xbb\xbf").lstrip()
    if found is None and path.suffix.lower() in _TABLES and not text.startswith(b"{"):
        found = "is a table; write its rows as lines of JSON (pandas: to_json(FILE, orient='records', lines=True))"
    if found is None:
        found = next((remedy for pattern, remedy in _TEXT.items() if pattern.match(text)), None)
    if found is not None:
        raise InputError(f"{path}: {found}; expected JSON Lines, one object a line")
