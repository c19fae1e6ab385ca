"""Health for people and machines: `/health`, `/health/live`, `/health/ready`."""

from flask import Blueprint, Response, jsonify

from worker.monitoring.health import Status
from worker.queue.producer import DeliveryQueue
from worker.redis_client import QueueUnavailable


def blueprint(queue: DeliveryQueue, status: Status) -> Blueprint:
    """Return the routes. None of them shows a host, a user or a password."""
    routes = Blueprint("health", __name__, url_prefix="/health")

    @routes.get("")
    def health() -> tuple[Response, int]:
        """Say how all is. Degraded is no failure: a load balancer that stops the intake mends nothing."""
        report = status.report()
        return jsonify(report), 503 if report["status"] == "failing" else 200

    @routes.get("/live")
    def live() -> Response:
        return jsonify(status="ok")

    @routes.get("/ready")
    def ready() -> tuple[Response, int]:
        """Say whether deliveries can be taken. The database is not asked: without it the intake goes on."""
        try:
            queue.ping()
        except QueueUnavailable as error:
            return jsonify(status="failing", error=str(error)), 503
        return jsonify(status="ok"), 200

    return routes
