"""`POST /users/<clerk_id>/pull`: reads a user from Clerk's API and answers with the row.

200  the row, as it is in Clerk now
400  not a Clerk user id
401  the token is missing or wrong
404  Clerk has no such user
429  too many users at once: all processes share a part of Clerk's rate limit
503  Clerk, the database or Redis does not answer
"""

import hmac
import math
import time

import structlog
from flask import Blueprint, request
from flask.typing import ResponseReturnValue

from db.merge.change import CLERK_ID
from worker.sync.pull_service import PullService, PullStatus

STATUS = {PullStatus.ABSENT: 404, PullStatus.BUSY: 429, PullStatus.UNAVAILABLE: 503}
RETRY_AFTER_S = 2  # unless Clerk asks for a longer wait

_log = structlog.get_logger("web.pull")


def blueprint(service: PullService, token: str) -> Blueprint:
    """Return the route, which needs the token."""
    routes = Blueprint("pull", __name__)

    @routes.post("/users/<clerk_id>/pull")
    def pull(clerk_id: str) -> ResponseReturnValue:
        """Answer with the user's row, fetched from Clerk."""
        if not _is_bearer(request.headers.get("Authorization", ""), token):
            return {"error": "the token is missing or wrong"}, 401, {"WWW-Authenticate": "Bearer"}
        if not CLERK_ID.fullmatch(clerk_id):
            return {"error": "not a Clerk user id"}, 400
        began = time.perf_counter()
        answer = service.pull(clerk_id)
        ms = round((time.perf_counter() - began) * 1000, 1)
        _log.info("pull", clerk_id=clerk_id, status=answer.status.value, ms=ms)
        if answer.user is not None:
            return answer.user
        status = STATUS[answer.status]
        if answer.status is PullStatus.ABSENT:
            return {"error": answer.reason}, status
        retry_after_s = max(RETRY_AFTER_S, math.ceil(answer.retry_after_s or 0))
        return {"error": answer.reason}, status, {"Retry-After": str(retry_after_s)}

    return routes


def _is_bearer(header: str, token: str) -> bool:
    scheme, _, given = header.partition(" ")
    is_token = hmac.compare_digest(given.strip().encode(errors="replace"), token.encode())
    return is_token and scheme.lower() == "bearer"
