"""Errors for the user: one sentence on stderr and an exit code, never a traceback.

Exit codes (the public contract): 2 a mistake of the user; 1 another failure outside this program, such as a full disk;
130 Ctrl-C in a tool or before a run begins. Bugs of this program are not caught here: they end with a traceback.
"""

import errno
import os
import sys
import time
from collections.abc import Callable

USER_MISTAKE = 2
FAILURE = 1
INTERRUPTED = 130
"""128 + SIGINT, as in shells. A run in progress saves and ends with 75 instead."""
RANK0_PRINT_SECONDS = 10
"""Seconds that other ranks wait before they exit on an error, so that rank 0 can print it."""


class UserError(ValueError):
    """A mistake of the user. The message is one sentence that names the wrong value and what to write instead."""

    def __init__(self, sentence: str) -> None:
        """Put the sentence on one line, also where a value that it quotes has line breaks."""
        super().__init__(" ".join(sentence.splitlines()))


class Failure(RuntimeError):
    """A failure outside this program, in one sentence; for example, a full disk on another rank."""


def explain(error: BaseException) -> tuple[int, str] | None:
    """(exit code, sentence) for an error outside this program; None for a bug.

    Covers UserError, Failure, and errors of the operating system on files: full disk, no permission, missing file.
    """
    if isinstance(error, UserError):
        return USER_MISTAKE, str(error)
    if isinstance(error, Failure):
        return FAILURE, str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return FAILURE, f"the disk is full{where}; free some space and run the same command again"
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        return FAILURE, f"{error.filename or 'a file'} is larger than the file size limit; raise the limit (ulimit -f)"
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return USER_MISTAKE, f"{error.filename} is on a read-only file system; write to another folder"
    if isinstance(error, FileExistsError):
        return USER_MISTAKE, f"{error.filename} is a file, or a link that leads nowhere; give the name of a folder"
    if isinstance(error, OSError) and error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
        return USER_MISTAKE, f"{error.filename}: {error.strerror}"
    if isinstance(error, PermissionError | FileNotFoundError | NotADirectoryError | IsADirectoryError):
        if isinstance(error, PermissionError):
            return USER_MISTAKE, f"{error.filename} cannot be written or read ({error.strerror}); check its permissions"
        return USER_MISTAKE, f"{error.filename}: {error.strerror}"
    return None


def run_main(main: Callable[[], int | None]) -> None:
    """Run a program's main and exit with its code (None is 0).

    Several processes fail by the same mistake: only rank 0 prints it, and the others wait so that it can.
    """
    try:
        code = main()
    except BrokenPipeError:  # the reader of the output closed it, as head does
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
            time.sleep(RANK0_PRINT_SECONDS)  # torchrun ends all processes once one has ended
    sys.exit(code or 0)
