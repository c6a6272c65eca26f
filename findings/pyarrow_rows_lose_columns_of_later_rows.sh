#!/usr/bin/env bash
# A column that the first record lacks is dropped by pyarrow and datasets, and by polars if the first hundred lack it.
#
# Versions: pyarrow 26.0.1, datasets 5.2.0, polars 2.1.0, pandas 3.1.1.
# Behaviour: Table.from_pylist and Dataset.from_list take the keys of the first record for all; polars looks at the
#   first 100 (infer_schema_length). Keys that come later are left out without an error. pandas keeps all.
# Output: two records, the second with "late": pandas [ms, late], pyarrow [ms], datasets [ms], polars [ms, late]; with
#   100 before it: polars [ms].
# Wrong guess: a table of records has the union of their keys, as in pandas. "error", "refused" or "stopped" are keys of
#   the few records where something went wrong, and those are the ones that are lost.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check pyarrow==26.0.1 datasets==5.2.0 polars==2.1.0 pandas==3.1.1
HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - <<'EOF'
import pandas as pd
import polars as pl
import pyarrow as pa
from datasets import Dataset


def columns(count):
    """The columns of `count` plain records and one with another key, by library."""
    records = [{"ms": 100.0}] * count + [{"ms": 900.0, "late": True}]
    return {
        "pandas": list(pd.DataFrame(records).columns),
        "pyarrow": pa.Table.from_pylist(records).column_names,
        "datasets": Dataset.from_list(records).column_names,
        "polars": pl.DataFrame(records).columns,
    }


few, many = columns(1), columns(100)
print("second record:", few)
print("hundred and first:", many)
assert few["pandas"] == many["pandas"] == ["ms", "late"], "pandas drops it"
assert few["pyarrow"] == few["datasets"] == ["ms"], "a later key is kept"
assert few["polars"] == ["ms", "late"] and many["polars"] == ["ms"], "polars reads another number of records"
EOF
