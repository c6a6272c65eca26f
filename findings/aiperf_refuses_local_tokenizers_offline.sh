#!/usr/bin/env bash
# AIPerf loads a tokenizer from a local folder unless HF_HUB_OFFLINE=1 is set; then the same folder is no valid name.
#
# Versions: aiperf 0.13.0, transformers 5.24.0.
# Behaviour: offline, a name is looked up in the hub's cache before anything else, and a path is no name of a repository:
#   "Repo id must be in the form 'repo_name' or 'namespace/repo_name'". Online the path goes to transformers.
# Output: transformers, offline: 2 tokens; aiperf: 2 tokens; aiperf with HF_HUB_OFFLINE=1: TokenizerError.
# Wrong guess: HF_HUB_OFFLINE=1 and a local folder are the way to run without a network, as with transformers; the error
#   reads as if the folder were misspelt.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check aiperf==0.13.0 transformers==5.24.0
cd "$dir"
export HF_HOME="$dir/hf"
mkdir tok
echo '{"tokenizer_class": "PreTrainedTokenizerFast"}' > tok/tokenizer_config.json
"$dir/venv/bin/python" -c "
from tokenizers import Tokenizer, models, pre_tokenizers
words = Tokenizer(models.WordLevel({'yes': 0, 'no': 1, '?': 2}, unk_token='?'))
words.pre_tokenizer = pre_tokenizers.Whitespace()
words.save('tok/tokenizer.json')"
cat > load.py <<'EOF'
import sys

from aiperf.common.tokenizer import Tokenizer, TokenizerError

try:
    print(len(Tokenizer.from_pretrained(sys.argv[1]).encode("yes no")), "tokens")
except TokenizerError as error:
    print("TokenizerError:", "Repo id must be" in str(error))
EOF
transformers=$(HF_HUB_OFFLINE=1 "$dir/venv/bin/python" -c "
from transformers import AutoTokenizer
print(len(AutoTokenizer.from_pretrained('$dir/tok')('yes no').input_ids), 'tokens')")
online=$(env -u HF_HUB_OFFLINE "$dir/venv/bin/python" load.py "$dir/tok")
offline=$(HF_HUB_OFFLINE=1 "$dir/venv/bin/python" load.py "$dir/tok")
echo "transformers, offline: $transformers; aiperf: $online; aiperf with HF_HUB_OFFLINE=1: $offline"
[[ $transformers == "2 tokens" && $online == "2 tokens" ]] || { echo "the folder is not loaded"; exit 1; }
[[ $offline == "TokenizerError: True" ]] || { echo "offline the folder is loaded, or fails otherwise"; exit 1; }
