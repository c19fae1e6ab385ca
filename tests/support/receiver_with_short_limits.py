"""A receiver whose limits are short, so that tests do not wait for those of production."""

from config import load
from web.connections import Limits
from web.server import serve
from worker import log

LIMITS = Limits(body_timeout_s=3.0)


def main() -> None:
    """Run the receiver."""
    settings = load("clerk_webhook_signing_secret", "redis_url", "database_url")
    log.configure(settings)
    serve(settings, LIMITS)


if __name__ == "__main__":
    main()
