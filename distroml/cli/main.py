"""The ``distroml`` program: global options, the commands, and what each error exits with.

Commands are named by import string and return their exit code; whatever they raise of ``distroml.errors`` becomes
one message on standard error and the exit code of its class.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter

from distroml import __version__
from distroml.cli.context import STDIN, Context
from distroml.client_transport import DEFAULT_TIMEOUT_S
from distroml.errors import DistroMLError

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

EPILOGUE = """Exit codes:
  0    done; a job that was followed is COMPLETED
  1    a job that was followed is FAILED or CANCELLED
  2    wrong usage, or an invalid job specification
  3    no such job
  4    the job's state does not allow it
  5    no node answered in time
  70   an internal error (please report it)
  74   the checkpoint store failed
  75   too many requests
  77   not authorized
  130  interrupted

Environment:
  DISTROML_URL  nodes to talk to, separated by commas; when one dies, the
                next is asked (default http://127.0.0.1:8101)
  NO_COLOR      set: no colours"""


app = App(
    name="distroml",
    help="Train models on a cluster in which no node is special.",
    version=__version__,
    help_format="plaintext",
    help_epilogue=EPILOGUE,
    default_parameter=Parameter(negative=()),
    result_action="return_value",
)
# what to import -> one line of help; the modules are only imported for the command that is called
_COMMANDS = {
    "jobs:submit": "Submit a job.",
    "jobs:jobs": "List jobs, the newest first.",
    "jobs:job": "Show a job, its workers and its result.",
    "watch:watch": "Watch a job until it is finished.",
    "logs:logs": "Print the output of a job's workers.",
    "checkpoints:checkpoint": "List, show, verify, save, export, import and remove checkpoints.",
    "incidents:incidents": "List a job's failures and recoveries.",
    "jobs:stop": "End an active job after a final checkpoint.",
    "jobs:cancel": "End an active job now.",
    "jobs:rm": "Forget a finished job.",
    "cluster:nodes": "List the nodes and what each offers.",
    "cluster:cluster": "Show the leader, the nodes and how much is in use.",
    "cluster:leader": "Show the leader, or hand leadership to another node.",
    "cluster:drain": "Move a node's workers elsewhere after a whole step.",
    "specdoc:spec": "Show the fields of a job specification with defaults and ranges.",
    "certs:certs": "Make and show a cluster's certificates and keys.",
}
_WITH_COMMANDS = frozenset({"checkpoints:checkpoint", "certs:certs"})
"""What has commands of its own: the library lets only its module set more than name and help."""
for _place, (_target, _help) in enumerate(_COMMANDS.items()):
    app.command(
        f"distroml.cli.{_target}",
        name=_target.partition(":")[2],
        help=_help,
        sort_key=_place,
        **({} if _target in _WITH_COMMANDS else {"help_epilogue": ""}),
    )


@app.meta.default
def _launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    url: str | None = None,
    json: Annotated[bool, Parameter(show_default=False)] = False,
    timeout: float = DEFAULT_TIMEOUT_S,
) -> int:
    """Bind the global options and run the command.

    Args:
        url: nodes to talk to, separated by commas; default: DISTROML_URL.
        json: print the API's JSON; one document per line where something is followed.
        timeout: seconds that a request may take, all retries included.
    """
    command, bound, ignored = app.parse_args(tokens, exit_on_error=False, print_error=False)
    if "ctx" in ignored:
        bound.arguments["ctx"] = Context(url=url, json=json, timeout_s=timeout)
    result = command(*bound.args, **bound.kwargs)
    return result if isinstance(result, int) else 0


def run(tokens: Sequence[str]) -> int:
    """One call of the command line; returns its exit code."""
    try:
        result = app.meta(
            [STDIN if token == "-" else token for token in tokens],
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
        sys.stdout.flush()
    except CycloptsError as error:
        return _fail(f"{error} See 'distroml --help'.", EXIT_USAGE)
    except DistroMLError as error:
        place = f" (at {error.field})" if error.field and error.field not in error.detail else ""
        return _fail(error.detail + place, error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # whoever read our output has seen enough; keep the interpreter from flushing into it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return result if isinstance(result, int) else 0


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"distroml: {message}\n")
    return code


def main() -> None:
    """Entry point of ``distroml``."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
