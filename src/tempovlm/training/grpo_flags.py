"""The flags of both trainings by GRPO, with the names of `GrpoOptions` and `LoopOptions`. Loads no torch."""

from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction

LOSS_TYPE_HELP = (
    "grpo or dr_grpo, as in trl: how a choice's actions are averaged, which is the same for its one action; both "
    "divide rewards as --scale_rewards says, and the Dr. GRPO paper's is --scale_rewards none"
)


def add_grpo_flags(parser: ArgumentParser) -> None:
    """Add what Exp 4 and Exp 5 have in common."""
    add = parser.add_argument
    add("--group_size", "--num_generations", type=int, default=5, help="settings drawn for a question")
    add("--num_iterations", type=int, default=2, help="steps on the same draws")
    add("--epsilon", type=float, default=0.2, help="how far the ratio of probabilities may pay off")
    add("--beta", type=float, default=0.0, help="weight of KL(policy || start), summed over all settings")
    add("--scale_rewards", default="group", help="whose spread rewards are divided by: group, batch or none")
    add("--loss_type", default="grpo", help=LOSS_TYPE_HELP)
    add("--entropy_coef", type=float, default=0.01, help="weight of the entropy")
    add("--alpha", type=float, default=1.0, help="weight of accuracy in the reward")
    add("--penalty", type=float, default=0.5, help="weight of lateness; the seed document's beta")
    add("--time_price", type=float, default=0.0, help="weight of the share of the budget that is used")
    add("--accuracy_source", default="table", help="table, or online: run the model at what is drawn")
    add("--mask_infeasible", action=BooleanOptionalAction, default=True, help="draw what the guard would allow")
    add("--warm_start", type=int, default=0, help="epochs of regression on all rewards before GRPO")
    add("--grad_accum", type=int, default=1, help="batches to a step")
    add("--lr_schedule", default="cosine", help="cosine or constant")
