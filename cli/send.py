"""`send`: signs a delivery and posts it, as Clerk would."""

import time
from contextlib import suppress
from typing import BinaryIO, NamedTuple

import click
import httpx

from cli import samples
from config import ServiceError, Settings, load
from db.times import now_ms
from web.webhook import PATH
from worker.clerk.payloads import ALL_TYPES

TIMEOUT_S = 15  # as long as Svix waits for an answer


class NotDelivered(ServiceError):
    """The delivery got no answer."""

    retryable = True


class DeliveryResponse(NamedTuple):
    """The receiver's answer: the HTTP status, and its word for the result."""

    http_status: int
    word: str

    def __str__(self) -> str:
        return f"{self.http_status} {self.word}"


def _check_url(_context: click.Context, _parameter: click.Parameter, url: str | None) -> str | None:
    with suppress(httpx.InvalidURL):
        if url is None or (httpx.URL(url).host and httpx.URL(url).scheme in ("http", "https")):
            return url
    raise click.BadParameter("must be a URL that begins with http:// or https:// and names a host")


def _check_svix_id(_context: click.Context, _parameter: click.Parameter, svix_id: str | None) -> str | None:
    if svix_id and not (svix_id.isascii() and svix_id.isprintable()):
        raise click.BadParameter("must be printable ASCII, as it is sent in a header")
    return svix_id


def http_client() -> httpx.Client:
    """Return a client that waits as long as Svix, and ignores proxy settings."""
    return httpx.Client(trust_env=False, timeout=TIMEOUT_S)


def deliver(client: httpx.Client, url: str, headers: dict[str, str], body: bytes) -> DeliveryResponse:
    """Post `body` with its signed headers, and return the answer. Raises NotDelivered."""
    try:
        response = client.post(url, content=body, headers=headers)
    except httpx.TransportError as error:
        raise NotDelivered(_explain(error, httpx.URL(url))) from None
    return DeliveryResponse(response.status_code, _word(response))


def local_url(settings: Settings) -> str:
    """Return where this machine reaches the receiver that listens on HOST and PORT."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104 - compares, does not listen
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"


@click.command()
@click.argument("type_", metavar="TYPE", required=False)
@click.option(
    "--url",
    callback=_check_url,
    help=f"URL of the endpoint, which ends in {PATH}.  [default: the one at HOST and PORT]",
)
@click.option(
    "--file",
    type=click.File("rb"),
    help="Send the bytes of this file instead of a sample; TYPE is then optional.",
)
@click.option(
    "--user-id",
    "clerk_id",
    help="The user the sample is about; for organization events, a member.  [default: a new user]",
)
@click.option(
    "--svix-id",
    callback=_check_svix_id,
    help="Id of the delivery. A used id makes it a redelivery.  [default: a new id]",
)
def send(
    type_: str | None, url: str | None, file: BinaryIO | None, clerk_id: str | None, svix_id: str | None
) -> int:
    """Sign a sample event of TYPE and deliver it, as Clerk would.

    It is signed with the first secret in CLERK_WEBHOOK_SIGNING_SECRET. The exit status is 0 if the receiver
    answers 2xx, else 1.
    """
    if file and clerk_id:
        raise click.UsageError("--user-id and --file exclude each other: a file is sent unchanged")
    if not file and type_ not in ALL_TYPES:
        raise click.BadParameter(f"choose one of {', '.join(ALL_TYPES)}", param_hint="TYPE")
    settings = load("clerk_webhook_signing_secret")
    if file:
        what, body = file.name, file.read()
    else:
        clerk_id = clerk_id or samples.new_id("user")
        event = samples.sample(str(type_), clerk_id, now_ms(), settings.clerk_instance_id or samples.INSTANCE)
        what, body = f"{type_} of {clerk_id}", samples.encode(event)
    svix_id = svix_id or samples.new_id("msg")
    headers = samples.signed_headers(settings.signing_keys[0], svix_id, int(time.time()), body)
    with http_client() as client:
        answer = deliver(client, url or local_url(settings) + PATH, headers, body)
    click.echo(f"{answer}: {what}, delivery {svix_id}")
    return 0 if httpx.codes.is_success(answer.http_status) else 1


def _explain(error: httpx.TransportError, url: httpx.URL) -> str:
    place = f"{url.scheme}://{url.netloc.decode()}"  # the rest of a URL may hold a password
    match error:
        case httpx.ConnectError():
            return f"nothing answers at {place}: start clerk-sync dev or clerk-sync web"
        case httpx.TimeoutException():
            return f"{place} did not answer within {TIMEOUT_S} s"
        case _:
            return f"{place} did not answer ({type(error).__name__})"


def _word(response: httpx.Response) -> str:
    try:
        answer = response.json()
    except ValueError:
        return response.reason_phrase
    word = answer.get("status") or answer.get("error") if isinstance(answer, dict) else None
    return " ".join(word.split()) if isinstance(word, str) else response.reason_phrase
