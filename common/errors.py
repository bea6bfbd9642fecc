"""What a user can mend, or has asked for: one line on stderr and an exit status."""

import contextlib
import errno
import signal
import sys

INCOMPLETE = 3  # exit status of a command that left out what it could not read, and did everything else
INTERRUPTED = 128 + signal.SIGINT  # exit status of what Ctrl-C ended, as shells have it
STOPPED = 75  # exit status of a run that was asked to stop, saved, and can go on


class UserError(ValueError):
    """Something the user gave is wrong; the message says what, and what to do."""


@contextlib.contextmanager
def exit_on_user_error():
    """Turns a UserError, a name that no file can have, or the death of a loader's worker into one line on stderr and
    exit status 2, and Ctrl-C into one and INTERRUPTED; any other error keeps its traceback."""
    try:
        yield
    except UserError as error:
        print(f"error: {_printable(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; what is written is whole", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except RuntimeError as error:  # torch raises it wherever the main process is when a worker of a loader dies
        if not str(error).startswith("DataLoader worker"):
            raise
        advice = "of too little memory perhaps: lower data.num_workers; what is written is whole"
        print(f"error: {_printable(reason(error))} {advice}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # whoever asks whether a file is there can meet it
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(f"error: {_printable(str(error.filename))} is too long for a file's name; give another", file=sys.stderr)
        sys.exit(2)


def _printable(text: str) -> str:
    """Control characters, which names of files and prompts may hold, move a terminal's cursor or worse: by their
    codes."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


@contextlib.contextmanager
def exit_when_stopped(advice: str):
    """Turns Ctrl-C and SIGTERM into one line on stderr, which ends with the advice, and exit status STOPPED; what runs
    inside meets both as KeyboardInterrupt and cleans up. For the main thread."""
    earlier = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        print(f"stopped; {advice}", file=sys.stderr)
        sys.exit(STOPPED)
    finally:
        signal.signal(signal.SIGTERM, earlier)


def reason(error: BaseException) -> str:
    """The first line of an exception's message, or its type's name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def one_line_errors():
    """A UserError from a DataLoader's worker loses the traceback that the loader puts into its message; one that died
    while it handed a batch over is told as torch tells of others."""
    try:
        yield
    except UserError as error:
        prefix = f"{UserError.__module__}.{UserError.__qualname__}: "
        raise UserError(str(error).strip().splitlines()[-1].removeprefix(prefix)) from None
    except (ConnectionError, EOFError) as error:
        raise RuntimeError(f"DataLoader worker died while it handed a batch over ({reason(error)})") from error
