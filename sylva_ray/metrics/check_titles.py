"""What the checks S1 to S14 are called in words, and when each passes. docs/checks.md explains them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckTitle:
    """A check in words.

    Attributes:
        title: a few words for tables and headings.
        passes_if: the condition.
    """

    title: str
    passes_if: str


CHECK_TITLES = {
    "S1": CheckTitle("threat model stated", "norm, attacks, knowledge and precision are stated"),
    "S2": CheckTitle("epsilon 0 changes nothing", "an attack with epsilon 0 leaves the benign accuracy as it is"),
    "S3": CheckTitle("falls with epsilon", "accuracy does not rise as epsilon grows"),
    "S4": CheckTitle("unbounded attack wins", "an attack that can reach every image leaves at most chance"),
    "S5": CheckTitle("converged in steps", "more steps neither help the model nor reduce its accuracy much"),
    "S6": CheckTitle("PGD beats FGSM", "many steps are at least as strong as one"),
    "S7": CheckTitle("restarts add little", "ten random starts are hardly stronger than one"),
    "S8": CheckTitle("black box is weaker", "attacks without gradients are not stronger than those with them"),
    "S9": CheckTitle("noise is weaker", "random noise breaks at most half as many images as the attack"),
    "S10": CheckTitle("gradients are useful", "gradients exist, the attack raises the loss, forwards agree"),
    "S11": CheckTitle("worst case is least", "the worst case per image is at most every single attack's accuracy"),
    "S12": CheckTitle("enough images", "at least 1,000 images were attacked, on the weights that are deployed"),
    "S13": CheckTitle("finds planted points", "the attack finds adversarial points that are known to exist"),
    "S14": CheckTitle("no collapse", "every client does better under attack than a constant answer would"),
}
"""By name, in the order of the page."""
