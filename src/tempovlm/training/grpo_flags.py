"""The flags of both trainings by GRPO, with the names of `GrpoOptions` and `LoopOptions`. Loads no torch."""

from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction


def add_grpo_flags(parser: ArgumentParser) -> None:
    """Add what Exp 4 and Exp 5 have in common."""
    add = parser.add_argument
    add("--group_size", "--num_generations", type=int, default=5, help="settings drawn for a question")
    add("--num_iterations", type=int, default=2, help="steps on the same draws")
    add("--epsilon", type=float, default=0.2, help="how far the ratio of probabilities may pay off")
    add("--beta", type=float, default=0.0, help="weight of the KL divergence to the start")
    add("--scale_rewards", help="group, batch or none; as --loss_type implies unless told")
    add("--loss_type", default="grpo", help="grpo or dr_grpo")
    add("--entropy_coef", type=float, default=0.01, help="weight of the entropy")
    add("--alpha", type=float, default=1.0, help="weight of accuracy in the reward")
    add("--penalty", type=float, default=0.5, help="weight of lateness; the seed document's beta")
    add("--time_price", type=float, default=0.0, help="weight of the share of the budget that is used")
    add("--accuracy_source", default="table", help="table, or online: run the model at what is drawn")
    add("--mask_infeasible", action=BooleanOptionalAction, default=True, help="draw what the guard would allow")
    add("--warm_start", type=int, default=0, help="epochs of regression on all rewards before GRPO")
    add("--grad_accum", type=int, default=1, help="batches to a step")
    add("--lr_schedule", default="cosine", help="cosine or constant")
