"""The command `ummunotify`: lets Ctrl-C end it without a traceback while Python still imports the package."""

import signal

_handler = signal.getsignal(signal.SIGINT)
if _handler is signal.default_int_handler:  # not where the caller ignores it, as nohup does
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> None:
    from ummunotify.cli import main as command

    signal.signal(signal.SIGINT, _handler)
    command()
