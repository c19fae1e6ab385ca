"""Why Redis cannot be used: maps the errors of redis-py to lines that are safe to show.

`explain` maps an error (of redis-py 8.1) to a line: the cause, then what to do. A line contains no host,
user, password, key or text of the server; for a refused permission it names the command. docs/operations.md
explains each line; the tests produce each on a real server.
"""

import re
import ssl
from collections.abc import Iterator
from socket import gaierror

from redis.exceptions import RedisError

MAY_NOT_RUN = "REDIS_URL's user may not run {command}: allow it (ACL SETUSER)"
UNKNOWN_COMMAND = "Redis does not know {command}: use Redis 6.2 or newer, with no command renamed"

# By the code at the beginning of Redis's answer; in an answer to a script the code follows later.
BY_CODE = {
    "NOAUTH": "Redis requires a password: put it into REDIS_URL",
    "WRONGPASS": "Redis refused the user or password: correct REDIS_URL",
    "LOADING": "Redis is loading its data: wait until it is done",
    "OOM": "Redis is out of memory: raise its maxmemory, or free memory",
    "MISCONF": "Redis cannot write to its disk: free space, or fix the disk",
    # UNBLOCKED is the answer to a client that waits for a job while the primary becomes a replica
    **dict.fromkeys(("READONLY", "UNBLOCKED"), "REDIS_URL leads to a read-only replica: name the primary"),
    "MASTERDOWN": "REDIS_URL leads to a replica without its primary: name the primary",
    "NOREPLICAS": "Redis has too few replicas: start them, or lower min-replicas-to-write",
    "BUSY": "Redis is busy with a script of another client: end it (SCRIPT KILL)",
    **dict.fromkeys(
        ("MOVED", "ASK", "CLUSTERDOWN", "CROSSSLOT", "TRYAGAIN"),
        "Redis runs in cluster mode: use one without (cluster-enabled no)",
    ),
}
CLUSTER_MODE = BY_CODE["CROSSSLOT"]
OUT_OF_MEMORY = BY_CODE["OOM"]
KEY_REFUSED = "REDIS_URL's user may not use a key: allow ~rq:* and ~clerk-sync:* (ACL SETUSER)"
CHANNEL_REFUSED = "REDIS_URL's user may not use a channel: allow &rq:* (ACL SETUSER)"
NO_ANSWER = "Redis did not answer in time: see what keeps it busy (SLOWLOG), or whether it hangs"
IN_USE = "all connections to Redis are in use here: raise REDIS_MAX_CONNECTIONS"
CLOSED = "Redis closed the connection unanswered: it is stopping or starting, or requires TLS (rediss://)"
CLIENT_CERTIFICATE = "Redis ended the TLS connection: it may require a client's certificate"

BY_TEXT = {
    "SELECT is not allowed in cluster mode": CLUSTER_MODE,
    "max number of clients reached": "Redis has too many connections: raise its maxclients, or close some",
    "DB index is out of range": "Redis has no database of that number: correct the end of REDIS_URL",
    "No connection available": IN_USE,
    "no connection is free": IN_USE,
    "command called from": UNKNOWN_COMMAND.format(command="a command of this service's scripts"),
    "can't run this command": MAY_NOT_RUN.format(command="a command of this service's scripts"),
    "permissions to access a key": KEY_REFUSED,
    "access one of the keys": KEY_REFUSED,
    "access at least one of the keys": KEY_REFUSED,
    "access one of the channels": CHANNEL_REFUSED,
    "access a channel": CHANNEL_REFUSED,
    "handshake operation timed out": "Redis does not offer TLS: begin REDIS_URL with redis://",
    "certificate required": CLIENT_CERTIFICATE,
    "Timeout connecting": "connecting to Redis timed out: check that it runs and that no firewall blocks it",
    "Timeout reading": NO_ANSWER,
    "Timeout writing": NO_ANSWER,
    "onnection closed by server": CLOSED,
}

# By the class of the underlying error; the first match counts.
BY_CLASS: tuple[tuple[type[BaseException], str], ...] = (
    (
        ssl.SSLCertVerificationError,
        "Redis's certificate is not trusted:"
        " name its CA's file in REDIS_SSL_CA_CERTS, or set REDIS_SSL_CERT_REQS=none",
    ),
    (ssl.SSLEOFError, CLIENT_CERTIFICATE),
    (ssl.SSLError, "Redis does not offer TLS: begin REDIS_URL with redis://"),
    (gaierror, "the host name in REDIS_URL is not found: correct it, or check the DNS"),
    (ConnectionRefusedError, "nothing listens where REDIS_URL leads: start Redis, or correct REDIS_URL"),
    (TimeoutError, BY_TEXT["Timeout connecting"]),
    (ConnectionResetError, CLOSED),
    (BrokenPipeError, CLOSED),
    (FileNotFoundError, "a file that REDIS_URL or REDIS_SSL_CA_CERTS names is not there"),
    (PermissionError, "a file that REDIS_URL or REDIS_SSL_CA_CERTS names may not be opened"),
    (OSError, "no route to where REDIS_URL leads: check the network"),
)
CERTIFICATE_OF_ANOTHER = "Redis's certificate is for another host name: write that one into REDIS_URL"
VERIFICATIONS = {  # by openssl's X509_V_ERR_…
    10: "Redis's certificate has expired: renew it",  # CERT_HAS_EXPIRED
    62: CERTIFICATE_OF_ANOTHER,  # HOSTNAME_MISMATCH
    64: CERTIFICATE_OF_ANOTHER,  # IP_ADDRESS_MISMATCH
}

COMMAND = re.compile(r"(?:run the|unknown command) [`'\"]([A-Za-z|]{2,40})")


def explain(error: RedisError) -> str:
    """Return why Redis did not do its work, and what to do."""
    text = "\n".join(str(cause) for cause in _chain(error))
    answer = f"{getattr(error, 'status_code', None) or ''} {error}".strip()
    code = next((code for code in BY_CODE if re.search(rf"\b{code}\b", answer)), None)
    return (
        (BY_CODE[code] if code else None)
        or _about_a_command(answer)
        or next((words for said, words in BY_TEXT.items() if said in text), None)
        or _about_the_connection(error)
        or f"Redis does not answer as expected ({type(error).__name__})"
    )


def _about_a_command(answer: str) -> str | None:
    found = COMMAND.search(answer)
    if found is None:
        return None
    command = found[1].upper().replace("|", " ")
    if "unknown command" in answer:
        return UNKNOWN_COMMAND.format(command=command)
    is_refused = answer.startswith("NOPERM") or "ACL failure in script" in answer
    return MAY_NOT_RUN.format(command=command) if is_refused else None


def _about_the_connection(error: RedisError) -> str | None:
    causes = list(_chain(error))
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError) and cause.verify_code in VERIFICATIONS:
            return VERIFICATIONS[cause.verify_code]
    return next(
        (words for class_, words in BY_CLASS if any(isinstance(cause, class_) for cause in causes)), None
    )


def _chain(error: RedisError) -> Iterator[BaseException]:
    """Yield the error and what caused it, but nothing of an earlier connection that redis-py opened anew."""
    caused: BaseException | None = error
    is_below = False  # whether an error of redis-py's own was caused by another one
    while caused is not None and not (is_below and isinstance(caused, RedisError)):
        yield caused
        is_below = not isinstance(caused, RedisError)
        caused = caused.__cause__ or caused.__context__
