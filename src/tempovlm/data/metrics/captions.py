"""CIDEr over a corpus of captions, computed by pycocoevalcap (the extra `captions`).

Source: Vedantam et al., CIDEr: Consensus-based Image Description Evaluation, CVPR 2015 (arXiv 1411.5726).
Words are split as by the official evaluation's tokenizer, see `treebank`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from tempovlm.core.errors import UserError
from tempovlm.data.metrics.treebank import words


def check_cider(num_pictures: int) -> None:
    """Check that `count` captions can be scored.

    Raises:
        UserError: pycocoevalcap is not installed, or there are fewer than two pictures.
    """
    if find_spec("pycocoevalcap") is None:
        raise UserError("CIDEr needs pycocoevalcap, which is not installed: pip install 'tempovlm[captions]'")
    if num_pictures < 2:
        raise UserError("CIDEr needs the captions of at least two pictures; ask for more with --num_samples")


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return the CIDEr score of each caption in a corpus of all of them; its mean is the corpus's score.

    Args:
        predictions: One caption for each picture.
        references: People's captions of the same pictures.

    Returns:
        A number from 0 to 10 for each picture; the usual figure is the mean, often times 100.

    Raises:
        UserError: pycocoevalcap is not installed, or there are fewer than two pictures, for which the weights of
            words that the score is made of are all zero, or no reference has a word.
    """
    check_cider(len(predictions))
    from pycocoevalcap.cider.cider import Cider

    said = {i: [text] for i, text in enumerate(words(predictions))}
    cut = iter(words([text for texts in references for text in texts]))
    right = {i: [next(cut) for _ in texts] for i, texts in enumerate(references)}
    if not any(text for texts in right.values() for text in texts):
        raise UserError("CIDEr needs captions to compare with, and none of these pictures' has a word")
    _, scores = Cider().compute_score(right, said)
    return [float(one) for one in scores]
