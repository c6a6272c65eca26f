#!/usr/bin/env bash
# MABWiser's UCB1 never tries an arm that it has no reward of, be it the best; with rewards below 0 it tries that first.
#
# Versions: mabwiser 2.7.4, river 0.26.1.
# Behaviour: an arm without rewards has the value 0 and no bonus for being unknown, whatever alpha is. Arms get there by
#   add_arm, or by a history in which they were never chosen. Arms with rewards above 0 stay above it for ever. With
#   costs for rewards, 0 is above all others. MABWiser's Thompson sampling and river's UCB find the new arm.
# Output: arms of 0.5 and 0.6 known, one of 1.0 added; of 300 choices, the new one's: UCB1 0 with alpha 1 and 0 with
#   alpha 10, Thompson sampling 297 (rewards drawn by these chances), river's UCB 256. First choice where all rewards
#   are 10 lower: the new arm.
# Wrong guess: UCB is optimism about what is unknown, and an arm that was never tried has an unbounded bonus, as in the
#   paper's "play each machine once". A setting that is added to a running server stays unused, and the reward's zero
#   point, which no policy of this kind should depend on, decides it.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check mabwiser==2.7.4 river==0.26.1
"$dir/venv/bin/python" - <<'EOF'
import random

from mabwiser.mab import MAB, LearningPolicy
from river import bandit

REWARDS = {"fast": 0.5, "middle": 0.6, "new": 1.0}
KNOWN, CHOICES = ["fast", "middle"] * 5, 300


def mabwiser(policy, reward):
    """A bandit that knows two arms and has just got the third one."""
    choosing = MAB(["fast", "middle"], policy, seed=1)
    choosing.fit(KNOWN, [reward(arm) for arm in KNOWN])
    choosing.add_arm("new")
    return choosing


def times_new(policy, reward):
    """How often MABWiser chooses the new arm while it learns."""
    choosing, times = mabwiser(policy, reward), 0
    for _ in range(CHOICES):
        arm = choosing.predict()
        times += arm == "new"
        choosing.partial_fit([arm], [reward(arm)])
    return times


def times_new_in_river(reward):
    choosing, times = bandit.UCB(delta=1, seed=1), 0
    for arm in KNOWN:
        choosing.update(arm, reward(arm))
    for _ in range(CHOICES):
        arm = choosing.pull(list(REWARDS))
        times += arm == "new"
        choosing.update(arm, reward(arm))
    return times


rng = random.Random(1)
found = {alpha: times_new(LearningPolicy.UCB1(alpha), REWARDS.get) for alpha in (1, 10)}
thompson = times_new(LearningPolicy.ThompsonSampling(), lambda arm: int(rng.random() < REWARDS[arm]))
river = times_new_in_river(REWARDS.get)
first = mabwiser(LearningPolicy.UCB1(1), lambda arm: REWARDS[arm] - 10).predict()
print(f"new arm chosen by UCB1 (alpha: times) {found}, Thompson sampling {thompson}, river's UCB {river}")
print(f"first choice with rewards 10 lower: {first}")
assert thompson > CHOICES / 2 and river > CHOICES / 2, "the others do not find the new arm either"
assert set(found.values()) == {0}, "UCB1 tries the new arm"
assert first == "new", "with rewards below 0 the new arm is not the first choice"
EOF
