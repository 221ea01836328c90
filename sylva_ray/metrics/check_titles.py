"""What the checks S1 to S14 are called in words, and when each passes. docs/checks.md explains them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckTitle:
    """A check in words.

    Attributes:
        title: a few words for tables and headings.
        passes_if: the condition, in a few words.
        exactly: the condition with its numbers.
        failure: what it means if the check fails.
    """

    title: str
    passes_if: str
    exactly: str
    failure: str


CHECK_TITLES = {
    "S1": CheckTitle(
        "threat model stated",
        "norm, attacks, knowledge and precision are stated",
        "the threat model is stated: norm, attacks, knowledge, precision",
        "the accuracy has no meaning",
    ),
    "S2": CheckTitle(
        "epsilon 0 changes nothing",
        "an attack with epsilon 0 leaves the benign accuracy as it is",
        "an attack with epsilon 0 does not change the benign accuracy",
        "predictions are random",
    ),
    "S3": CheckTitle(
        "falls with epsilon",
        "accuracy does not rise as epsilon grows",
        "accuracy does not rise by more than 1 point as epsilon grows: 0, 1, 2, 4, ... 64/255",
        "gradients are masked",
    ),
    "S4": CheckTitle(
        "unbounded attack wins",
        "an attack that can reach every image leaves at most chance",
        "under PGD-20 at epsilon 1, which can reach every image, accuracy is at most chance (1 / "
        "classes), in the mean and of every client, or above it by less than the error of the "
        "images that were attacked (its 95 % interval; of single clients with a level for all of "
        "them together)",
        "gradients are masked, or the prediction is constant: all robust accuracies are too high",
    ),
    "S5": CheckTitle(
        "converged in steps",
        "more steps neither help the model nor reduce its accuracy much",
        "accuracy does not rise with the steps of PGD (1 to 200), and drops by at most 1 point from 50 to 200",
        "the attack has not converged",
    ),
    "S6": CheckTitle(
        "PGD beats FGSM",
        "many steps are at least as strong as one",
        "accuracy under PGD-20 is at most that under FGSM",
        "gradients are masked",
    ),
    "S7": CheckTitle(
        "restarts add little",
        "ten random starts are hardly stronger than one",
        "ten random starts reduce the accuracy by at most 2 points compared with one",
        "one start is not enough; use the worst case",
    ),
    "S8": CheckTitle(
        "black box is weaker",
        "attacks without gradients are not stronger than those with them",
        "accuracy under Square, noise and (with `--transfer`) transfer attacks is at least that "
        "under gradient attacks, minus 0.2 points",
        "gradients are masked",
    ),
    "S9": CheckTitle(
        "noise is weaker",
        "random noise breaks at most half as many images as the attack",
        "random noise breaks at most half as many images as the attack (where neither breaks any, this says nothing)",
        "the attack is hardly better than chance",
    ),
    "S10": CheckTitle(
        "gradients are useful",
        "gradients exist, the attack raises the loss, forwards agree",
        "the gradient is zero or not finite on fewer than 1 % of the images; PGD raises the loss on "
        "at least 95 %; five forwards agree to 1e-4; outputs are not probabilities",
        "gradients are masked or vanish, or the model is random",
    ),
    "S11": CheckTitle(
        "worst case is least",
        "the worst case per image is at most every single attack's accuracy",
        "the worst case over attacks per image is at most the accuracy under every single attack",
        "the attacks used different images",
    ),
    "S12": CheckTitle(
        "enough images",
        "at least 1,000 images were attacked, on the weights that are exported",
        "at least 1,000 images were used, and the attacked weights are bit-identical to the exported adapters, if any",
        "the confidence interval is wide, or other weights were attacked",
    ),
    "S13": CheckTitle(
        "finds planted points",
        "the attack finds adversarial points that are known to exist",
        "the attack finds at least 95 % of adversarial points that are known to exist, and random search at most half "
        "of them",
        "the attack is too weak for this model, or the points are too easy to find",
    ),
    "S14": CheckTitle(
        "no collapse",
        "every client does better under attack than a constant answer would",
        "no client is `collapsed`: each robust accuracy exceeds the majority share, and more than "
        "one class is predicted",
        "the robust accuracy of that client shows no defence: a constant prediction is as accurate",
    ),
}
"""By name, in the order of the page."""
