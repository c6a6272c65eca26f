"""What the experiment scripts share: underscored flags without a parser from outside, and failures as one line.

The GPU host lacks the commands' flag parser, so scripts that run there use the standard library's.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

from tempovlm.core.errors import AllFailedError, UserError
from tempovlm.data.registry import check_datasets as check_datasets
from tempovlm.engine.threads import prepare
from tempovlm.profiling.processes import process_began_s

_EXTRA = ("scipy", "sklearn", "pandas", "pyarrow", "matplotlib", "tensorboard")

_EXIT_NOTHING, _EXIT_USAGE, _EXIT_INTERRUPTED = 1, 2, 130


class FlagParser(argparse.ArgumentParser):
    """Flags in full, spelled with underscores; a wrong one is a `UserError`."""

    def __init__(self, description: str) -> None:
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage, which would not be one line."""
        raise UserError(f"{message} (--help lists the flags)")


def run(main: Callable[[list[str]], None]) -> NoReturn:
    """Run a script's main function on the command line's words and end the process.

    Exit codes: 0, 1 where every question failed, 2 for wrong input or a package that is not installed (each one
    line on stderr), 130 after Ctrl-C.
    """
    try:
        main(sys.argv[1:])
    except AllFailedError as error:
        _fail(" ".join(str(error).splitlines()), _EXIT_NOTHING)
    except UserError as error:
        _fail(" ".join(str(error).splitlines()), _EXIT_USAGE)
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to resume", _EXIT_INTERRUPTED)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA:
            raise
        message = f"needs {package}, which is not installed: pip install 'tempovlm[experiments]'"
        _fail(message, _EXIT_USAGE)
    sys.exit(0)


def _fail(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(code)


@dataclass(frozen=True, slots=True)
class Share:
    """This process among those of `torchrun`; `began_s`, since the epoch, is when it was started."""

    rank: int = 0
    world: int = 1
    began_s: float = field(default_factory=process_began_s, compare=False)

    @classmethod
    def of_process(cls) -> Share:
        """As `torchrun` tells; alone without it.

        Raises:
            UserError: `RANK` and `WORLD_SIZE` are no place among some processes.
        """
        rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
            raise UserError(f"RANK={rank} WORLD_SIZE={world}: give numbers from 0 to below WORLD_SIZE, or neither")
        return cls(int(rank), int(world))

    def device(self, wanted: str) -> str:
        """The GPU of this process where several share the work and none is named."""
        if self.world == 1 or wanted not in ("auto", "cuda"):
            return wanted
        prepare()  # threads are set before torch is imported
        import torch

        is_cuda = wanted == "cuda" or torch.cuda.is_available()
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if is_cuda else "cpu"


def seed(text: str) -> int:
    """The type of a flag for a seed that all generators of random numbers take."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{value}: must be from 0 to {2**32 - 1}")
    return value


def positive(flag: str, value: int) -> int:
    """The value.

    Raises:
        UserError: it is below 1.
    """
    if value < 1:
        raise UserError(f"--{flag} {value}: must be at least 1")
    return value
