"""The compared receivers: Flask applications, which run under gunicorn."""

import os

from flask import Flask, request
from svix.webhooks import Webhook

from tests.bench.baseline_job import handle_body


def echo_app() -> Flask:
    """Return a Flask application that answers with the body it was sent."""
    app = Flask(__name__)

    @app.post("/webhooks/clerk")
    def echo() -> bytes:
        return request.get_data()

    return app


def inline_app() -> Flask:
    """Return a Flask application that verifies and writes to PostgreSQL before it answers."""
    app = Flask(__name__)
    webhook = Webhook(os.environ["CLERK_WEBHOOK_SIGNING_SECRET"])

    @app.post("/webhooks/clerk")
    def handle() -> tuple[str, int]:
        webhook.verify(request.get_data(), dict(request.headers))
        handle_body(request.get_data())
        return "", 204

    return app
