#!/usr/bin/env bash
# Answers in JSON lines that are all dates arrive as timestamps: "2019-05-01" is no string any more, nor written as one.
#
# Versions: datasets 5.2.0, pyarrow 26.0.1, pandas 3.1.1.
# Behaviour: pyarrow's JSON reader, which load_dataset("json") uses, makes a timestamp of a column of strings if each of
#   them is an ISO 8601 date or time; one other answer keeps the column as strings. Features with Value("string") are
#   applied to what was read, so they get the timestamp's text. pyarrow's explicit_schema keeps the strings.
# Output: answers of two dates: datetime(2019, 5, 1, 0, 0) by pyarrow and datasets; str() says "2019-05-01 00:00:00",
#   equal to no label, and so do features. With a third answer "yes": the strings of the file. pandas keeps both.
# Wrong guess: JSON has strings, and a string is read as one. A split by question type (all "when was it signed?") then
#   has other types than the whole file, and exact match is 0 there.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1
HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - "$dir" 2>/dev/null <<'EOF'
import datetime
import json
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.json
from datasets import Features, Value, load_dataset

folder = Path(sys.argv[1])


def read(name, answers):
    """The first answer of a file of some answers, by library."""
    path = folder / f"{name}.jsonl"
    records = [{"question_id": i, "answer": one} for i, one in enumerate(answers)]
    path.write_text("\n".join(map(json.dumps, records)))
    options = {"data_files": str(path), "split": "train", "cache_dir": str(folder / "cache")}
    typed = Features({"question_id": Value("int64"), "answer": Value("string")})
    schema = pa.json.ParseOptions(explicit_schema=pa.schema([("answer", pa.string())]))
    return {
        "pyarrow": pa.json.read_json(path)["answer"][0].as_py(),
        "datasets": load_dataset("json", **options)[0]["answer"],
        "typed": load_dataset("json", features=typed, **options)[0]["answer"],
        "schema": pa.json.read_json(path, parse_options=schema)["answer"][0].as_py(),
        "pandas": pd.read_json(path, lines=True).answer[0],
    }


dates, mixed = read("dates", ["2019-05-01", "1998-12-24"]), read("mixed", ["2019-05-01", "1998-12-24", "yes"])
print("dates:", dates)
print("with another one:", mixed)
assert dates["pyarrow"] == dates["datasets"] == datetime.datetime(2019, 5, 1), "dates stay strings"
assert str(dates["datasets"]) == dates["typed"] == "2019-05-01 00:00:00", "features keep the strings"
assert dates["schema"] == dates["pandas"] == "2019-05-01", "nothing keeps the strings"
assert set(mixed.values()) == {"2019-05-01"}, "one other answer does not keep the column"
EOF
