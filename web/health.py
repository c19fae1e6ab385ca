"""The health pages: `/health`, `/health/live`, `/health/ready`."""

from flask import Blueprint, Response, jsonify

from worker.monitoring.health import Status
from worker.monitoring.probes import Probe, ask
from worker.queue.producer import DeliveryQueue


def blueprint(queue: DeliveryQueue, status: Status) -> Blueprint:
    """Return the routes. Their answers contain no host, user or password."""
    routes = Blueprint("health", __name__, url_prefix="/health")
    # One probe at a time for all callers, on a connection that no delivery uses.
    readiness = Probe("ready", queue.ping)

    @routes.get("")
    def health() -> tuple[Response, int]:
        """Report everything. `degraded` is 200: stopping deliveries at a load balancer would not help."""
        report = status.report()
        return jsonify(report), 503 if report["status"] == "failing" else 200

    @routes.get("/live")
    def live() -> Response:
        return jsonify(status="ok")

    @routes.get("/ready")
    def ready() -> tuple[Response, int]:
        """Say whether deliveries can be queued. This does not depend on the database."""
        error = ask(readiness)["ready"].error
        if error is not None:
            return jsonify(status="failing", error=error), 503
        return jsonify(status="ok"), 200

    return routes
