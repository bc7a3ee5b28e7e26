"""Files in place of JSON Lines are refused by what they are."""

import gzip
import json

import pytest

from phi4mm_jax import InputError
from phi4mm_jax.data.filters import read_lines
from phi4mm_jax.data.manifests import open_manifest
from phi4mm_jax.engine.jsonl import read_requests

LINE = {"prompt": "x", "messages": [{"role": "user", "content": "q"}]}
OTHERS = {
    "array.json": (json.dumps([LINE, LINE], indent=2).encode(), r"array\.json: is one JSON array; .* jq -c '\.\[\]'"),
    "one_line.json": (b"\xef\xbb\xbf" + json.dumps([LINE]).encode(), "is one JSON array"),
    "object.jsonl": (json.dumps(LINE, indent=1).encode(), "has objects over several lines; .* jq -c"),
    "lines.jsonl.gz": (gzip.compress(json.dumps(LINE).encode()), "compressed by gzip; unpack it"),
    "lines.jsonl.zst": (b"\x28\xb5\x2f\xfd\x00", "compressed by zstd; unpack it"),
    "part-0001": (b"PAR1 PAR1", r"is Parquet, which .* \.parquet"),
    "data.arrow": (b"ARROW1\0\0", r"is an Arrow file; .*Dataset\.save_to_disk"),
    "table.csv": (b"prompt,answer\nx,y\n", "is a table; .*lines=True"),
}


@pytest.mark.parametrize(
    "read", [open_manifest, lambda p: read_requests(p, max_new_tokens=1), lambda p: [*read_lines(p)]]
)
@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_refused_by_what_they_are(tmp_path, name, read):
    content, message = OTHERS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize("content", [json.dumps(LINE), "\n" + json.dumps(LINE) + "\n", "[1, 2]\n" + json.dumps(LINE)])
def test_lines_are_taken_under_any_name(tmp_path, content):
    """Also where one is broken, which is its own error."""
    (tmp_path / "lines.csv").write_text(json.dumps(LINE))
    (tmp_path / "lines.txt").write_text(content)
    for name in ("lines.csv", "lines.txt"):
        manifest = open_manifest(tmp_path / name)
        assert manifest.read(len(manifest) - 1) == LINE
        manifest.close()


def test_a_folder_that_is_no_dataset_names_its_files(tmp_path):
    (tmp_path / "metadata.jsonl").write_text(json.dumps(LINE))
    with pytest.raises(InputError, match=r"is not a dataset .*; give one of its files \(metadata\.jsonl\)"):
        open_manifest(tmp_path)
