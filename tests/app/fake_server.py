"""`python tests/app/fake_server.py PORT PAUSE_SECONDS GRACE_SECONDS`: fake lanes in a process."""

import sys

from app.__main__ import DrainingServer, make_config
from app.api.deps import Services
from app.lifecycle import Lifecycle
from app.logs import configure_logs
from app.main import create_app
from app.settings import Settings
from tests.app.fakes import FakeDecodeLane, load_fakes, make_settings


def main(port: int, pause_seconds: float, grace_seconds: float) -> None:
    def load(settings: Settings, lifecycle: Lifecycle) -> Services:
        services = load_fakes(settings, lifecycle)
        for task in (services.registry.translate.default, services.registry.generate.default):
            assert task is not None
            assert isinstance(task.lane, FakeDecodeLane)
            task.lane.pause_seconds = pause_seconds
        return services

    configure_logs("info")
    settings = make_settings(port=port, shutdown_seconds=grace_seconds)
    app = create_app(settings, load)
    DrainingServer(make_config(app, settings), app, grace_seconds).run()


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
