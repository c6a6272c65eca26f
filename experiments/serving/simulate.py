r"""Simulate requests that share a lane: who is answered right and on time under which load, policy and price.

Reads measured answers and times, and drives the schedule and the rule of choice that serve. Prints a table; writes
all figures to `--json`, which `tempovlm evaluate --under_load` takes, and a page with plots to `--output_dir`.

Examples:
    python experiments/serving/simulate.py --arrivals poisson bursts --loads 0.5 1.0 1.7 \
        --policies native greedy table clairvoyant:table --price derived 0 --json runs/load.json
    python experiments/serving/simulate.py --arrivals trace.csv --first_request 4409 --loads 1.0 \
        --policies native_sheds greedy table kind clairvoyant --budgets_ms 80 160 320 --discipline edf fcfs \
        --output_dir runs/under_load
"""

from __future__ import annotations

import sys

from tempovlm.core.files import make_folder
from tempovlm.lab import script
from tempovlm.lab.queueing.study import Study


def flags() -> script.FlagParser:
    """Make the script's parser."""
    return script.FlagParser(__doc__, Study)


def main(argv: list[str]) -> None:
    """Simulate, write what is asked for, and print the table."""
    study = script.options_from(Study, vars(flags().parse_args(argv)))
    from tempovlm.engine.threads import prepare

    prepare()
    for path, where in ((study.json and study.json.parent, "--json"), (study.output_dir, "--output_dir")):
        if path is not None:
            make_folder(path, where)  # now, and not when there are figures
    from tempovlm.lab.queueing import page
    from tempovlm.lab.queueing.study import render, run_study, write_report

    report = run_study(study)
    sys.stdout.write(render(report))
    if study.json is not None:
        write_report(report, study.json)
        sys.stdout.write(f"{study.json}\n")
    if study.output_dir is not None:
        sys.stdout.writelines(f"{path}\n" for path in page.write(report, study.output_dir))


if __name__ == "__main__":
    script.run(main)
