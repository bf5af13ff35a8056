"""`python -m app`: serve with the settings, leave in order when told to. `python -m app key`: make a key."""

import argparse
import asyncio
import gc
import logging
import os
import resource
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import uvicorn
from dotenv import dotenv_values
from fastapi import FastAPI
from pydantic import ValidationError

from app.connections import FACTOR, bounded
from app.keys import KeyFileError, key_line, make_key
from app.lifecycle import begin_drain
from app.logs import configure_logs
from app.settings import ENV_FILE, Settings, settings_table, unknown_variables

log = logging.getLogger("app")

# The end of the grace period belongs to closing: answers of aborted work, the device thread's last step.
_CLOSING_SHARE, _CLOSING_SECONDS = 0.25, 3.0
# Longer than clients keep an idle connection (5 seconds in httpx, which is in most of them): who closes first
# must not be the server, or now and then a request meets a connection that is just going.
_KEEP_ALIVE_SECONDS = 15
_OTHER_FILES = 200  # than connections: weights, libraries, pipes
# A signal to a process group comes twice when make, in the same group, passes it on: one wish, not two.
_ECHO_SECONDS = 0.2


class DrainingServer(uvicorn.Server):
    """On the first signal goes on answering until the accepted work is done; on the second ends at once.

    uvicorn's own way closes the port first, so that nobody could read that /ready is off.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI, grace_seconds: float) -> None:
        super().__init__(config)
        self._app = app
        self._drain_seconds = grace_seconds - min(_CLOSING_SHARE * grace_seconds, _CLOSING_SECONDS)
        self._deadline: float | None = None
        self._signalled = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.started or self._app.state.services is None:
            os._exit(0)  # nothing was accepted yet, and loading cannot be interrupted
        if self._deadline is None:
            self._deadline, self._signalled = now + self._drain_seconds, now
        elif now - self._signalled > _ECHO_SECONDS:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)

    async def on_tick(self, counter: int) -> bool:
        if self._app.state.failure is not None:
            return True
        if self._deadline is not None:
            begin_drain(self._app)
            if self._app.state.lifecycle.n_in_flight == 0:
                return True
            if time.monotonic() >= self._deadline:
                # What is left ends as aborted, so that its clients still get an answer.
                await asyncio.to_thread(self._app.state.services.worker.stop)
                return True
        return await super().on_tick(counter)


def warn_of_unknown_variables() -> None:
    """A misspelled variable changes nothing, and nobody would know."""
    unknown = unknown_variables({*os.environ, *dotenv_values(ENV_FILE)})
    if unknown:
        log.warning("no such settings, ignored: %s", ", ".join(unknown))


def make_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """How uvicorn serves the application."""
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=bounded(settings.max_connections, settings.receive_seconds, settings.read_seconds),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=1,
    )


def make_room_for_connections(max_connections: int) -> None:
    """Raise the limit of open files as far as the connections need; exits where the system forbids it."""
    wanted = FACTOR * max_connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            sys.exit(
                f"max_connections is {max_connections}: that takes {wanted} open files, {hard} are allowed"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def serve(settings: Settings) -> None:
    """Returns when the service has been told to end and has ended."""
    # Read when torch is loaded. By default the threads of a step spin at every barrier, and when anything
    # else wants their cores, the event loop for one, a step takes 20 times as long as with sleeping threads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from app.main import create_app  # here, because it imports torch, which the table does not need

    configure_logs(settings.log_level)
    warn_of_unknown_variables()
    try:
        app = create_app(settings, listen_early=True)
    except KeyFileError as error:
        sys.exit(f"API keys: {error}")
    make_room_for_connections(settings.max_connections)
    DrainingServer(make_config(app, settings), app, settings.shutdown_seconds).run()
    # The interpreter looks through all objects for garbage, several times, before it ends: seconds on a busy
    # machine, for memory that the end of the process gives back.
    gc.freeze()
    if app.state.failure is not None:
        sys.exit(1)


def print_key(arguments: list[str]) -> None:
    """Make a key and print it, this once, with the line that a key file takes."""
    parser = argparse.ArgumentParser(
        prog="python -m app key", description="Make an API key; only its hash is to be stored."
    )
    parser.add_argument("--name", default="client", help="what logs call it (default: client)")
    parser.add_argument("--admin", action="store_true", help="may administer the service, too")
    chosen = parser.parse_args(arguments)
    key = make_key()
    try:
        line = key_line(chosen.name, key, admin=chosen.admin)
    except KeyFileError as error:
        sys.exit(str(error))
    print(f"key, for the client:       {key}")
    print(f"line, for the key file:    {line}")


def print_inspection(arguments: list[str]) -> None:
    """Say what a checkpoint is, and exit with 1 where it cannot be served."""
    from app.inspection import inspect_folder  # here, because it imports torch

    parser = argparse.ArgumentParser(
        prog="python -m app inspect", description="What a checkpoint is and takes; nothing is loaded."
    )
    parser.add_argument("folder", type=Path)
    lines, fits = inspect_folder(parser.parse_args(arguments).folder, Settings())
    print("\n".join(lines))
    sys.exit(0 if fits else 1)


def main(arguments: list[str]) -> None:
    """Settings come from the arguments, else the environment, else `.env`."""
    if arguments == ["--settings-table"]:
        print(settings_table(), end="")
        return
    if arguments[:1] == ["key"]:
        print_key(arguments[1:])
        return
    if arguments[:1] == ["inspect"]:
        print_inspection(arguments[1:])
        return
    try:
        settings = Settings(_cli_parse_args=arguments)
    except ValidationError as error:
        faults = [": ".join(filter(None, (".".join(map(str, f["loc"])), f["msg"]))) for f in error.errors()]
        sys.exit("settings: " + "; ".join(faults))
    serve(settings)


if __name__ == "__main__":
    main(sys.argv[1:])
