"""Make `docs/console.png`: the console after the demo, in the headless Chromium of this machine.

make picture
"""

import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

import config
from cli.dev import demo
from cli.dev.servers import PostgresServer, RedisServer, free_port
from tests.support.directories import open_directory
from tests.support.migrations import migrate
from tests.support.settings import SECRET
from tests.support.stack import Stack

PICTURE = Path(__file__).parents[2] / "docs" / "console.png"
PASSWORD = "of the picture alone"
SIZE = {"width": 1000, "height": 900}


def main() -> None:
    """Start everything, play the samples, and photograph the page."""
    with open_directory() as directory:
        postgres = PostgresServer(directory / "postgres", free_port(), durable=False)
        redis = RedisServer(directory / "redis", free_port(), durable=False)
        try:
            postgres.start()
            redis.start()
            settings = config.load(
                _env_file=None,
                database_url=postgres.url,
                redis_url=redis.url,
                clerk_webhook_signing_secret=SECRET,
                console_password=PASSWORD,
                port=free_port(),
            )
            migrate(settings)
            with Stack(settings, directory) as stack:
                demo.play(settings, stack.url)
                _photograph(f"{stack.base_url}/console")
        finally:
            redis.kill()
            postgres.stop("immediate")


def _photograph(url: str) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": SIZE["width"], "height": SIZE["height"]},
            http_credentials={"username": "operator", "password": PASSWORD},
        )
        page.goto(url)
        page.screenshot(path=PICTURE, full_page=False)
        browser.close()


if __name__ == "__main__":
    main()
