"""Learning rate as a pure function of how much of the training is done."""

import math

from train.settings import OptimizerSettings


def learning_rate(settings: OptimizerSettings, done: float) -> float:
    """Rise in a line over the warm-up, then fall as the schedule says.

    Parameters
    ----------
    done
        Share of the training that lies behind, counted to the end of the coming step: 0 < done <= 1.
    """
    if done < settings.warmup:
        return settings.learning_rate * done / settings.warmup
    left = (1 - done) / (1 - settings.warmup)
    match settings.schedule:
        case "constant":
            return settings.learning_rate
        case "linear":
            return settings.learning_rate * left
        case "cosine":
            return settings.learning_rate * (1 + math.cos(math.pi * (1 - left))) / 2
