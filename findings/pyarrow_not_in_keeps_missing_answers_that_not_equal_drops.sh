#!/usr/bin/env bash
# Reading Parquet by `answer != "yes"` drops the rows without an answer, by `answer not in ["yes"]` it keeps them.
#
# Versions: pyarrow 26.0.1, datasets 5.2.0, pandas 3.1.1, polars 2.1.0, duckdb 2.0.1.
# Behaviour: a comparison with a missing value is neither true nor false, so pyarrow drops the row. is_in is never
#   missing: it is false there, and its negation true. SQL and polars drop the row in both cases; pandas keeps it in
#   both, unless it hands the filter to pyarrow while reading, as datasets does too.
# Output: of "yes", "no", a missing one and "yes" the rows that != and `not in` leave: pyarrow, datasets and pandas
#   while reading [2] and [2, 3]; pandas afterwards [2, 3] and [2, 3]; polars and duckdb [2] and [2].
# Wrong guess: a list of one value asks what the value asks, and a filter while reading only saves memory. With != the
#   questions that were refused or cut off are no wrong answers, and the error rate is half of what `not in` counts.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check pyarrow==26.0.1 datasets==5.2.0 pandas==3.1.1 \
  polars==2.1.0 duckdb==2.0.1
cd "$dir"
HF_HUB_OFFLINE=1 HF_HOME="$dir" "$dir/venv/bin/python" - <<'EOF'
import datasets
import duckdb
import pandas
import polars
import pyarrow
from pyarrow import parquet

FILE, RIGHT = "answers.parquet", "yes"
FILTERS = [("answer", "!=", RIGHT)], [("answer", "not in", [RIGHT])]
datasets.disable_progress_bars()
parquet.write_table(pyarrow.table({"row": [1, 2, 3, 4], "answer": [RIGHT, "no", None, RIGHT]}), FILE)


def load(filters):
    """Rows that `datasets` loads from the file; the second call must not get what the first one cached."""
    loaded = datasets.load_dataset("parquet", data_files=FILE, filters=filters, split="train", cache_dir=filters[0][1])
    return loaded["row"][:]


frame, lazy = pandas.read_parquet(FILE), polars.scan_parquet(FILE)
masks = frame.answer != RIGHT, ~frame.answer.isin([RIGHT])
terms = polars.col("answer") != RIGHT, ~polars.col("answer").is_in([RIGHT])
conditions = f"answer <> '{RIGHT}'", f"answer NOT IN ('{RIGHT}')"
found = {
    "pyarrow": [parquet.read_table(FILE, filters=filters)["row"].to_pylist() for filters in FILTERS],
    "datasets": [load(filters) for filters in FILTERS],
    "pandas, while reading": [pandas.read_parquet(FILE, filters=filters)["row"].tolist() for filters in FILTERS],
    "pandas, afterwards": [frame[mask]["row"].tolist() for mask in masks],
    "polars": [lazy.filter(term).collect()["row"].to_list() for term in terms],
    "duckdb": [[row for (row,) in duckdb.sql(f"SELECT row FROM '{FILE}' WHERE {c}").fetchall()] for c in conditions],
}
for name, (not_equal, not_in) in found.items():
    print(f"{name}: != {not_equal}, not in {not_in}")
for name in ("pyarrow", "datasets", "pandas, while reading"):
    assert found[name] == [[2], [2, 3]], f"{name}: both ask the same"
assert found["pandas, afterwards"] == [[2, 3]] * 2, "pandas drops rows without an answer"
assert found["polars"] == found["duckdb"] == [[2]] * 2, "polars or SQL keeps rows without an answer"
EOF
