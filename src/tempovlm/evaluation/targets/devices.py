"""The machines that rows are measured on, and what is asked of each: its budgets and its price of time."""

from __future__ import annotations

GPUS = ("h200", "h100")
"""Each with the same rows and the same bounds."""

HARDWARE = {"cpu": "cpu", "h200": "NVIDIA H200", "h100": "NVIDIA H100 80GB HBM3"}
"""Device in names and paths → what the stamp of its result files must have."""

PLACE = {"cpu": "2-core CPU", "h200": "H200", "h100": "H100"}

GPU_JUDGED_MS = "10 11 12 14 16"
"""What the pocket is judged by on a GPU: between the bounds of its settings, which a host that pauses puts far
above what they usually take, 3.5 to 5 milliseconds."""

GPU_ANSWERED_MS = "6 7 8 10 12"
"""What it is asked for there: budgets that hold what a host may lose between two launches."""

GPU_TIME_PRICE = "2.0"
"""What a GPU's controllers and baselines pay for time; more than on the CPU, for accuracy is worth fewer
milliseconds there."""

JUDGED_MS = {"cpu": "60 80 100 150 200 300", **dict.fromkeys(GPUS, GPU_JUDGED_MS)}
ANSWERED_MS = {"cpu": "60 100 150 200 300", **dict.fromkeys(GPUS, GPU_ANSWERED_MS)}
"""The budgets of Exp 8."""

_TIME_PRICE = {"cpu": "0.3", **dict.fromkeys(GPUS, GPU_TIME_PRICE)}


def time_price(device: str) -> tuple[str, str]:
    """The flag with what a device's controllers, and the baselines that they are judged by, pay for time."""
    return ("--time_price", _TIME_PRICE[device])


def suffix(gpu: str) -> str:
    """The end of a row's name where the H200's row has none."""
    return "" if gpu == GPUS[0] else f"_{gpu}"


def place_of(device: str, hardware: str) -> str:
    """The machine's name in paths of results.

    Args:
        device: cpu or cuda.
        hardware: the processor's own name; a GPU that has no rows of its own takes the places of the first.
    """
    if device == "cpu":
        return "cpu"
    return next((gpu for gpu in GPUS if HARDWARE[gpu] in hardware), GPUS[0])
