#!/usr/bin/env bash
# A gate that is always right has accuracy 1 in torchmetrics, and 0.875 if its logits come one by one.
#
# Versions: torchmetrics 1.9.0, torch 2.13.0 (CPU).
# Behaviour: logits are told from probabilities by their values, at each update anew: if one of a batch is below 0 or
#   above 1, all get a sigmoid; if none is, they are taken as they are. A batch of logits from 0 to 0.5 is then "no",
#   and an area under the curve compares both kinds with each other. Probabilities give the same in every batch.
# Output: 200 logits from -2 to 2, the label is their sign: one batch, accuracy 1 and area 1; batches of 10 or of
#   1: 0.875 and 0.859; with the sigmoid taken before: 1 and 1 in all.
# Wrong guess: a metric that accepts logits knows that they are logits, and a metric with a state does not depend on
#   how its data was cut. The gate of an early exit, asked for one request at a time, looks worse than in training.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$dir/venv/bin/pip" install -q --disable-pip-version-check torchmetrics==1.9.0
"$dir/venv/bin/python" - <<'EOF'
import torch
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC

logits = torch.linspace(-2, 2, 200)
labels = (logits > 0).long()
BATCHES = len(logits), 10, 1


def scores(predictions, batch):
    """Accuracy and area under the curve of predictions that come in batches."""
    metrics = BinaryAccuracy(), BinaryAUROC()
    for metric in metrics:
        for part, truth in zip(predictions.split(batch), labels.split(batch)):
            metric.update(part, truth)
    return tuple(round(metric.compute().item(), 3) for metric in metrics)


found = {batch: scores(logits, batch) for batch in BATCHES}
given = {batch: scores(logits.sigmoid(), batch) for batch in BATCHES}
for batch in BATCHES:
    print(f"batches of {batch}: logits {found[batch]}, probabilities {given[batch]}")
assert set(given.values()) == {(1.0, 1.0)}, "probabilities depend on the batch"
assert found[len(logits)] == (1.0, 1.0), "one batch is not all right"
for batch in BATCHES[1:]:
    assert found[batch] == (0.875, 0.859), f"batches of {batch} are known to be logits"
EOF
