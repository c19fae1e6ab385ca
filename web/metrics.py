"""`/metrics`, for Prometheus."""

from flask import Blueprint, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from config import Settings
from worker.monitoring.metrics import Metrics
from worker.monitoring.prometheus import MetricsEndpoint


def blueprint(settings: Settings, metrics: Metrics) -> Blueprint:
    """Return the route. Whichever process answers, the figures are those of the whole installation."""
    endpoint = MetricsEndpoint(settings, metrics)
    routes = Blueprint("metrics", __name__)

    @routes.get("/metrics")
    def show() -> Response:
        return Response(endpoint.render(), content_type=CONTENT_TYPE_PLAIN_0_0_4)

    return routes
