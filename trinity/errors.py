"""How a mistake reaches the user: one sentence on stderr and a code, never a traceback.

Codes (the public contract): 2 the user's mistake, 1 anything else that went wrong outside our code (a full disk);
130 Ctrl-C in a tool or before a run begins.
Our own mistakes are not caught here: they are assertions, and their traceback is what we want to see.
"""

import errno
import os
import sys
import time
from collections.abc import Callable

USER_MISTAKE = 2
FAILURE = 1
INTERRUPTED = 130
"""128 + SIGINT, as shells count; a run in progress does not come here: it saves and ends with 75."""
FIRST_RANK_SECONDS = 10
"""How long the other processes of a launch wait before they end by a mistake, so that the first can print it."""


class UserError(ValueError):
    """The user's mistake: the message names the value that is wrong and what to write instead, in one sentence."""

    def __init__(self, sentence: str) -> None:
        """Keep the sentence on one line, whatever the values that it quotes hold."""
        super().__init__(" ".join(sentence.splitlines()))


class Failure(RuntimeError):
    """What went wrong outside our code, said in one sentence: a full disk on another rank."""


def explain(error: BaseException) -> tuple[int, str] | None:
    """(exit code, sentence) for an error that is not ours, None for one that is.

    Covers UserError and what the operating system says of files: full, unwritable, missing.
    """
    if isinstance(error, UserError):
        return USER_MISTAKE, str(error)
    if isinstance(error, Failure):
        return FAILURE, str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return FAILURE, f"the disk is full{where}; free some space and run the same command again"
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        return FAILURE, f"{error.filename or 'a file'} is larger than files may be here; raise the limit (ulimit -f)"
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return USER_MISTAKE, f"{error.filename} is on a file system that is read-only; write elsewhere"
    if isinstance(error, OSError) and error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
        return USER_MISTAKE, f"{error.filename}: {error.strerror}"
    if isinstance(error, PermissionError | FileNotFoundError | NotADirectoryError | IsADirectoryError):
        if isinstance(error, PermissionError):
            return USER_MISTAKE, f"{error.filename} cannot be written or read ({error.strerror}); check its permissions"
        return USER_MISTAKE, f"{error.filename}: {error.strerror}"
    return None


def run_main(main: Callable[[], int | None]) -> None:
    """Run a command line's main and leave the process with its code (None is 0).

    Of several processes, which all fail by the same mistake, the first alone prints; the others leave it time to.
    """
    try:
        code = main()
    except BrokenPipeError:  # whoever read our output has seen enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = INTERRUPTED
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        code, sentence = explained
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {sentence}", file=sys.stderr)
        elif "TORCHELASTIC_RUN_ID" in os.environ:
            time.sleep(FIRST_RANK_SECONDS)  # torchrun ends all processes once one has ended
    sys.exit(code or 0)
