"""The laboratory: experiments and instruments around the method, each run as `python -m lab.NAME`."""

import sys
from pathlib import Path

from nanoalign import UserError, cli
from nanoalign.terminal import print_anything


def run_command(commands: dict, description: str = "") -> None:
    """`python -m lab.NAME COMMAND flags`: `cli.run` that command's (main, config_class)."""
    if sys.argv[1:2] and sys.argv[1] in commands:
        return cli.run(*commands[sys.argv.pop(1)], description)
    names = list(commands)
    example = f"python {cli.program()} {names[0]} --help"
    sys.exit(f"error: name a command: {' or '.join(names)} ({example}).")


def pyplot(path: str):
    """matplotlib's pyplot, or a sentence that says what is missing. Ask before the long work, not after."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install -e '.[plot]'.") from None
    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix[1:] not in kinds:
        raise UserError(f"--plot {path}: expected a name that ends in .png, or in one of {', '.join(kinds)}.")
    return pyplot


def run_on_paths(main) -> None:
    """`python -m lab.NAME PATH…`: main(paths); a user's mistake is one sentence on stderr and status 1."""
    print_anything()
    if {"-h", "--help"} & set(sys.argv):
        sys.exit(print(sys.modules["__main__"].__doc__))
    with cli.sentences():
        main(sys.argv[1:])
