#!/usr/bin/env bash
# sacreBLEU gives 0 to answers that are all right if none of them has four words, and 100 once one of them has.
#
# Versions: sacrebleu 2.6.0.
# Behaviour: the score of a corpus is the mean, by product, of shares of runs of one to four words. Where no answer has a
#   run of four there is nothing to share, and that counts as 0; smoothing is for runs that are there and wrong. A
#   sentence's score leaves such lengths out.
# Output: "yes", "two", "red bus", all right: corpus 0, each sentence 100, chrF 100; all wrong: 0. With "a red bus stops"
#   more: 100. 99 wrong words and that sentence right: 44.
# Wrong guess: answers equal to their references score 100 and others less, so a table by type of question is comparable.
#   Types with short answers are 0 for every model, and one long answer decides about a split's score.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check sacrebleu==2.6.0
"$dir/venv/bin/python" - <<'EOF'
import sacrebleu

SHORT, LONG = ["yes", "two", "red bus"], "a red bus stops"
sentences = [sacrebleu.sentence_bleu(answer, [answer]).score for answer in SHORT]
found = {
    "all right": sacrebleu.corpus_bleu(SHORT, [SHORT]),
    "all wrong": sacrebleu.corpus_bleu(["no", "six", "old car"], [SHORT]),
    "all right, one of them long": sacrebleu.corpus_bleu([*SHORT, LONG], [[*SHORT, LONG]]),
    "only the long one right": sacrebleu.corpus_bleu(["no"] * 99 + [LONG], [["yes"] * 99 + [LONG]]),
}
scores = {name: round(score.score, 6) for name, score in found.items()}
for name, score in found.items():
    print(f"{name}: {score.score:.1f}, shares {score.precisions}")
chrf = sacrebleu.corpus_chrf(SHORT, [SHORT]).score
print("sentences", [round(score, 6) for score in sentences], "chrF", round(chrf, 6))
assert scores["all right"] == scores["all wrong"] == 0, "short answers that are right have a score"
assert scores["all right, one of them long"] == 100, "a long answer does not make the score"
assert 40 < scores["only the long one right"] < 50, "wrong words weigh otherwise"
assert [round(score, 6) for score in sentences] == [100] * 3 and round(chrf, 6) == 100, "a sentence alone is not 100"
EOF
