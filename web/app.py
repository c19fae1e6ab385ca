"""Builds the Flask application: the receiver, the health pages, the metrics and the console."""

from multiprocessing.util import Finalize

import structlog
from flask import Flask, json
from flask.typing import ResponseReturnValue
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response

from config import Settings
from web import console, health, webhook
from worker import log
from worker.monitoring.health import Status
from worker.monitoring.metrics import Metrics
from worker.monitoring.prometheus import MetricsEndpoint
from worker.monitoring.receivers import ReceiverTasks
from worker.queue.producer import delivery_queue

_log = structlog.get_logger("web.app")


def start(settings: Settings) -> Flask:
    """Configure logging and return the application for one process of the server."""
    log.configure(settings)
    counts = Metrics()
    tasks = ReceiverTasks(settings, counts)
    tasks.start()
    Finalize(None, tasks.stop, exitpriority=0)  # a forked process runs these, but no atexit functions
    return create_app(settings, counts)


def create_app(settings: Settings, counts: Metrics | None = None) -> Flask:
    """Return the application. It connects to Redis when the first delivery arrives.

    It counts in `counts`, which are added to the totals in Redis, at the latest when `/metrics` is read.
    """
    counts = Metrics() if counts is None else counts
    app = Flask("web", static_folder=None)
    app.url_map.merge_slashes = False  # A redirect would tell Clerk that the delivery failed.
    queue = delivery_queue(settings)
    status = Status(settings)
    receiver = webhook.Receiver(settings, queue, counts)
    app.add_url_rule(
        webhook.PATH, view_func=receiver.receive, methods=["POST"], provide_automatic_options=False
    )
    app.register_blueprint(health.blueprint(queue, status))
    totals = MetricsEndpoint(settings, counts)  # of the whole installation, whichever process answers
    app.add_url_rule(
        "/metrics",
        "metrics",
        lambda: app.response_class(totals.render(), content_type=CONTENT_TYPE_PLAIN_0_0_4),
    )
    if settings.pull_token:
        # Loaded here, as it brings an HTTP client, which the receiver does without.
        from web import pull  # noqa: PLC0415 - see above
        from worker.sync.pull_service import PullService  # noqa: PLC0415 - see above

        service = app.extensions["pull_service"] = PullService(settings)
        app.register_blueprint(pull.blueprint(service, settings.pull_token.get_secret_value()))
    if settings.console_password:
        app.register_blueprint(console.blueprint(settings, settings.console_password, status))
    app.register_error_handler(HTTPException, _as_json)
    app.register_error_handler(Exception, _not_now)
    return app


def _as_json(error: HTTPException) -> Response:
    response = error.get_response()
    response.content_type = "application/json"
    response.set_data(json.dumps({"error": error.name}))
    return response


def _not_now(error: Exception) -> ResponseReturnValue:
    _log.error("unexpected error", error=log.fault(error))
    return {"error": "not now"}, 503, {"Retry-After": str(webhook.RETRY_AFTER_S)}
