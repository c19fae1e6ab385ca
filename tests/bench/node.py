"""The Node handler; npm installs its packages into the directory of the measurements."""

import shutil
import subprocess
from contextlib import AbstractContextManager
from pathlib import Path

from cli.dev.servers import free_port
from tests.bench.harness import Bench, Endpoint
from tests.bench.plan import Setting

HANDLER = Path(__file__).with_name("node_handler.mjs")
PACKAGES = ("express@4", "svix", "pg")
INSTALL_LIMIT_S = 180


def is_there() -> bool:
    """Return whether this machine has Node and npm; without them the handler is not measured."""
    return shutil.which("node") is not None and shutil.which("npm") is not None


def node_handler(bench: Bench, setting: Setting) -> AbstractContextManager[Endpoint]:
    """Run the handler; it uses one core, as Node does."""
    node, port = _installed(bench.directory / "node"), free_port()
    env = {"PORT": str(port), "NODE_ENV": "production"}
    return bench.serving(port, [node, HANDLER.name], bench.urls(setting), bench.directory / "node", env)


def _installed(directory: Path) -> str:
    node, npm = shutil.which("node"), shutil.which("npm")
    assert node
    assert npm
    if not directory.exists():
        directory.mkdir()
        shutil.copy(HANDLER, directory)
        command = [npm, "install", "--silent", "--no-audit", "--no-fund", *PACKAGES]
        subprocess.run(command, cwd=directory, check=True, timeout=INSTALL_LIMIT_S, stdout=subprocess.DEVNULL)
    return node
