"""The Node handler: its packages come from the npm registry into the bench's own directory."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cli.dev.servers import free_port
from tests.bench.harness import Bench, Endpoint
from tests.bench.plan import Setting

HANDLER = Path(__file__).with_name("node_handler.mjs")
PACKAGES = ("express@4", "svix", "pg")
INSTALL_LIMIT_S = 180


def is_there() -> bool:
    """Return whether this machine has Node and npm; without them its parts are left out."""
    return shutil.which("node") is not None and shutil.which("npm") is not None


@contextmanager
def node_handler(bench: Bench, setting: Setting) -> Iterator[Endpoint]:
    """Run the handler; it uses one core, as Node does."""
    node, port = _installed(bench.directory / "node"), free_port()
    env = {"PORT": str(port), "NODE_ENV": "production"}
    with bench.running([node, HANDLER.name], bench.urls(setting), bench.directory / "node", env) as process:
        bench.await_answer(process, port)
        yield Endpoint(port, process)


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
