"""CIDEr over a corpus of captions, computed by pycocoevalcap (the extra `captions`).

Source: Vedantam et al., CIDEr: Consensus-based Image Description Evaluation, CVPR 2015 (arXiv 1411.5726).
Words are those of the official evaluation's tokenizer, see `treebank`.
"""

from __future__ import annotations

from collections.abc import Sequence

from tempovlm.core.errors import UserError
from tempovlm.tasks.treebank import words


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """The CIDEr score of each caption, in a corpus of all of them; its mean is the corpus's score.

    Args:
        predictions: One caption for each picture.
        references: What people wrote for the same pictures.

    Returns:
        A number from 0 to 10 for each picture; the common figure is the mean, often times 100.

    Raises:
        UserError: pycocoevalcap is not installed, or there are fewer than two pictures, for which the weights of
            words that the score is made of are all zero.
    """
    try:
        from pycocoevalcap.cider.cider import Cider
    except ModuleNotFoundError:
        raise UserError(
            "CIDEr needs pycocoevalcap, which is not installed: pip install 'tempovlm[captions]'"
        ) from None
    if len(predictions) < 2:
        raise UserError("CIDEr needs the captions of at least two pictures")
    said = {i: [text] for i, text in enumerate(words(predictions))}
    cut = iter(words([text for texts in references for text in texts]))
    right = {i: [next(cut) for _ in texts] for i, texts in enumerate(references)}
    _, scores = Cider().compute_score(right, said)
    return [float(one) for one in scores]
