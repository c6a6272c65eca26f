#!/usr/bin/env bash
# A logprob of -inf leaves a pydantic model as null and cannot be read back by the same model, or comes back as None.
#
# Versions: pydantic 2.14.4.
# Behaviour: model_dump_json writes nan, inf and -inf as null (ser_json_inf_nan="null" is the default), though `float`
#   does not allow null; model_dump and json.dumps keep them (as -Infinity, which JSON does not know).
# Output: {"token":"a","logprob":null}; reading it fails with float_type. With `float | None` it is read, as None; with
#   ser_json_inf_nan="strings" or "constants" as -inf.
# Wrong guess: what a model has written, the model reads, with the same values. A token that sampling had ruled out is
#   then one whose logprob was not asked for, and a sum over an answer that skips None calls it likely.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check pydantic==2.14.4
"$dir/venv/bin/python" - <<'EOF'
import json
import math

from pydantic import BaseModel, ConfigDict, ValidationError


class Token(BaseModel):
    token: str
    logprob: float


class Optional(BaseModel):
    token: str
    logprob: float | None = None


class Strings(Token):
    model_config = ConfigDict(ser_json_inf_nan="strings")


class Constants(Token):
    model_config = ConfigDict(ser_json_inf_nan="constants")


def back(kind):
    """The logprob after a way through JSON, or the type of the error."""
    try:
        return kind.model_validate_json(kind(token="a", logprob=-math.inf).model_dump_json()).logprob
    except ValidationError as error:
        return error.errors()[0]["type"]


written = Token(token="a", logprob=-math.inf)
print(written.model_dump_json(), "|", json.dumps(written.model_dump()))
found = {kind.__name__: back(kind) for kind in (Token, Optional, Strings, Constants)}
print("read back:", found)
assert json.loads(written.model_dump_json())["logprob"] is None, "infinity is written"
assert json.loads(json.dumps(written.model_dump()))["logprob"] == -math.inf, "the dump has lost it too"
assert found["Token"] == "float_type", "null is read as a number"
assert found["Optional"] is None, "an optional number comes back"
assert found["Strings"] == found["Constants"] == -math.inf, "no setting keeps it"
EOF
