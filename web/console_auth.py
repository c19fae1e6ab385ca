"""Admits operators to the console: HTTP basic authentication with one password, and tokens for its forms."""

import hmac
from hashlib import sha256

from flask import Response, request
from itsdangerous import BadSignature, URLSafeTimedSerializer

from worker.monitoring.login_throttle import WINDOW_S, LoginThrottle

TOKEN_AGE_S = 12 * 3600
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src data:; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class ConsoleAuth:
    """Admits requests with the password; the user name may be any."""

    def __init__(self, password: str, throttle: LoginThrottle) -> None:
        self._password = _digest(password)
        self._throttle = throttle
        self._tokens = URLSafeTimedSerializer(password, salt="clerk-sync console form")

    def refusal(self) -> Response | None:
        """Return the answer to a request that is refused; None if it is admitted."""
        given = request.authorization
        if given is None or given.type != "basic" or given.password is None:
            return _unauthorized()
        if not self._throttle.may_try(request.remote_addr):
            headers = {"Retry-After": str(WINDOW_S)}
            return Response("Too many attempts.\n", 429, headers, mimetype="text/plain")
        if not hmac.compare_digest(_digest(given.password), self._password):
            return _unauthorized()
        self._throttle.succeeded(request.remote_addr)
        return None

    def token(self) -> str:
        """Return the token that a form must send back: only pages that require the password contain it."""
        return self._tokens.dumps("form")

    def has_token(self) -> bool:
        """Say whether the form has a token of this console that is at most TOKEN_AGE_S old."""
        try:
            self._tokens.loads(request.form.get("token", ""), max_age=TOKEN_AGE_S)
        except BadSignature:
            return False
        return True


def _unauthorized() -> Response:
    challenge = {"WWW-Authenticate": 'Basic realm="clerk-sync", charset="UTF-8"'}
    return Response("A password is required.\n", 401, challenge, mimetype="text/plain")


def _digest(password: str) -> bytes:
    return sha256(password.encode("utf-8", "surrogateescape")).digest()


def harden(response: Response) -> Response:
    """Add the headers that forbid framing, storing, and scripts from elsewhere."""
    response.headers.update(HEADERS)
    return response
