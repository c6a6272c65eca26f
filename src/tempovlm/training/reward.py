"""What a choice of setting was worth: accuracy, less a penalty for the time beyond the budget. Knows no policy.

reward = alpha · accuracy - penalty · max(0, latency - budget) / budget - time_price · latency / budget

The first two terms are the seed document's, which calls the penalty's weight beta; here beta is what GRPO and trl
call beta, the weight of the KL term. They leave time within the budget free, so that all of it is worth spending
on the smallest gain. With a price, an answer that is as good but earlier is better, and what one question does not
need is not spent on it. Shapes: `B` questions with a budget each, `G` choices of a group.
"""

from __future__ import annotations

from torch import Tensor

ALPHA = 1.0
PENALTY = 0.5
TIME_PRICE = 0.0


def overshoot(latency_ms: Tensor, budget_ms: Tensor) -> Tensor:
    """Share of the budget by which (B, G) latencies exceed the (B,) budgets; 0 for those in time.

    Raises:
        ValueError: a budget is not a positive number.
    """
    if not bool((budget_ms > 0).all()):
        raise ValueError("budgets must be positive numbers of milliseconds")
    budget_ms = budget_ms.unsqueeze(-1)
    return (latency_ms - budget_ms).clamp(min=0) / budget_ms


def reward(
    accuracy: Tensor,
    latency_ms: Tensor,
    budget_ms: Tensor,
    *,
    alpha: float = ALPHA,
    penalty: float = PENALTY,
    time_price: float = TIME_PRICE,
) -> Tensor:
    """(B, G) rewards of (B, G) accuracies from 0 to 1 and latencies under (B,) budgets.

    Raises:
        ValueError: a budget is not a positive number.
    """
    late = penalty * overshoot(latency_ms, budget_ms)
    return alpha * accuracy - late - time_price * latency_ms / budget_ms.unsqueeze(-1)
