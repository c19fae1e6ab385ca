"""`/console`: one page for operators. It works without JavaScript, and without Redis or the database.

Its data comes from `worker.monitoring.overview`; its buttons call `worker.queue.failed_jobs`.
"""

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlencode

import structlog
from flask import Blueprint, redirect, render_template, request
from flask.typing import ResponseReturnValue
from pydantic import SecretStr

from config import Settings
from db.ledger import Minute
from db.merge.change import CLERK_ID
from db.times import to_datetime
from web.console_auth import ConsoleAuth, harden
from worker.monitoring.health import Status
from worker.monitoring.login_throttle import LoginThrottle
from worker.monitoring.overview import ConsoleData
from worker.monitoring.words import ago, printable, span
from worker.queue.failed_jobs import FailedJobFilter, FailedJobs, ReplayResult
from worker.redis_client import ENCODING_ERRORS, QueueUnavailable

MAX_FORM_BYTES = 256 * 1024
LISTED = 20
VERBS = ("replay", "discard")
ALL = "all"

_log = structlog.get_logger("web.console")


class JobAction(NamedTuple):
    """What a form requests: to replay or discard the jobs with these ids, or all that had failed by then."""

    verb: str
    ids: tuple[str, ...]
    every: bool
    until: datetime
    is_confirmed: bool


def blueprint(settings: Settings, password: SecretStr, status: Status) -> Blueprint:
    """Return the routes of the page, its form and its files; all require the password."""
    data = ConsoleData(status)
    auth = ConsoleAuth(password.get_secret_value(), LoginThrottle(settings))
    console = Blueprint(
        "console",
        __name__,
        url_prefix="/console",
        template_folder="templates",
        static_folder="static",
        static_url_path="/static",
    )

    @console.get("")
    def page() -> ResponseReturnValue:
        """Show the page; `?user=` adds the history of one user."""
        asked = request.args.get("user", "").strip()
        clerk_id = asked if CLERK_ID.fullmatch(asked) else None
        overview = data.look(clerk_id)
        now = datetime.now(UTC)
        activity = overview.activity.value
        return render_template(
            "console/page.html",
            overview=overview,
            health=overview.health,
            activity=activity,
            minutes=_last_hour(activity.minutes, now) if activity else None,
            now=now,
            asked=asked,
            clerk_id=clerk_id,
            notice=_notice(),
        )

    @console.post("/jobs")
    def apply_action() -> ResponseReturnValue:
        """Replay or discard failed jobs; acting on all of them, or deleting any, needs a confirmation."""
        request.max_content_length = MAX_FORM_BYTES
        action = _requested_action() if auth.has_token() else None
        if action is None:
            return render_template("console/refused.html"), 400
        try:
            return _apply(data.failed_jobs, action)
        except QueueUnavailable:
            return redirect(_link(notice="redis"), 303)

    @console.context_processor
    def form_token() -> dict[str, object]:
        return {"token": auth.token(), "link": _link}

    console.before_request(auth.refusal)
    console.after_request(harden)
    console.add_app_template_filter(ago)
    console.add_app_template_filter(span, "seconds")
    console.add_app_template_filter(to_datetime, "moment")
    console.add_app_template_filter(printable)
    console.add_app_template_filter(_as_value, "as_value")
    return console


def _last_hour(minutes: Sequence[Minute], now: datetime) -> list[Minute]:
    """Return the 60 minutes up to `now`, also those without events; the last of them is not over."""
    by_start = {minute.start: minute for minute in minutes}
    last = now.replace(second=0, microsecond=0)
    starts = (last - timedelta(minutes=ago) for ago in reversed(range(60)))
    return [by_start.get(start, Minute(start, 0, 0)) for start in starts]


def _requested_action() -> JobAction | None:
    """Read the form; None if it is not one of this page."""
    verb, _, which = request.form.get("do", "").partition(" ")
    try:
        until = datetime.fromisoformat(request.form.get("until", ""))
    except ValueError:
        return None
    if verb not in VERBS or until.tzinfo is None:
        return None
    chosen = [which] if which and which != ALL else request.form.getlist("id")
    ids = tuple(unquote(value, errors=ENCODING_ERRORS) for value in chosen)
    return JobAction(verb, ids, which == ALL, until, request.form.get("confirmed") == "1")


def _apply(jobs: FailedJobs, action: JobAction) -> ResponseReturnValue:
    ids = jobs.ids(FailedJobFilter(until=action.until)) if action.every else action.ids
    if not ids:
        return redirect(_link(notice="none"), 303)
    if (action.every or action.verb == "discard") and not action.is_confirmed:
        return render_template("console/confirm.html", action=action, ids=ids, listed=LISTED)
    results = Counter(result for _, result in getattr(jobs, action.verb)(ids))
    counts: dict[str, Any] = {result.name.lower(): count for result, count in results.items()}
    _log.info("console", action=action.verb, **counts)
    return redirect(_link(notice=action.verb, **counts), 303)


def _link(path: str = "", **query: object) -> str:
    """Return a relative URL within the console, which works under any path prefix that a proxy removes."""
    up = "" if request.path.endswith("/console") else "../"
    return f"{up}console{path}" + (f"?{urlencode(query)}" if query else "")


def _notice() -> str | None:
    """Return the notice about the form that was sent before this page."""
    match request.args.get("notice"):
        case "redis":
            return "Redis does not answer. Some jobs may not be done: check the list and try again."
        case "none":
            return "No failed job was selected."
        case "replay" | "discard":
            counts = ((result, request.args.get(result.name.lower(), 0, int)) for result in ReplayResult)
            return ", ".join(f"{count} {result}" for result, count in counts if count)
        case _:
            return None


def _as_value(id_: str) -> str:
    """Return an id, which may hold any characters, as a form's value."""
    return quote(id_, safe="", errors=ENCODING_ERRORS)
