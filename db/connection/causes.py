"""Why the database cannot be used: maps errors of libpq and PostgreSQL to a `Cause`, which is safe to show.

An error of the server has a SQLSTATE. An error of the connection has only a text of libpq, the server or a
pooler, which names hosts, users and databases: it is matched against the patterns here, never shown.
Sources: PostgreSQL 18, appendix A "PostgreSQL Error Codes"; the texts of libpq 18, PostgreSQL 13 to 18 and
PgBouncer 1.18 to 1.24. A server whose `lc_messages` is not English yields NO_CONNECTION where only its text
tells causes apart.
"""

import re
from enum import Enum

import psycopg


class Cause(Enum):
    """A cause of DatabaseUnavailable: what is wrong (`sentence`) and what to do (`next_step`).

    Both are fixed texts without hosts, names or values. `name` is the stable key for JSON and metrics.
    """

    sentence: str
    next_step: str

    def __init__(self, sentence: str, next_step: str) -> None:
        self.sentence = sentence
        self.next_step = next_step

    # Reaching the server
    NOTHING_LISTENS = (
        "nothing listens at its host and port",
        "start PostgreSQL, or correct host and port in the URL",
    )
    HOST_NOT_FOUND = (
        "its host name was not found",
        "correct the host in the URL, or the DNS of this machine",
    )
    UNREACHABLE = ("its host cannot be reached", "check network, firewall and IP allow-list")
    CONNECT_TIMEOUT = (
        "the connection timed out",
        "check host, port, firewall and IP allow-list: packets are dropped on the way, or a pooler waits for"
        " its server",
    )
    NO_ANSWER = (
        "the connection was lost, or no answer came in time",
        "wait: the worker reconnects; if it lasts, look at the server's log and at the pooler",
    )
    URL_OPTION = (
        "an option of the URL is refused",
        "correct what follows the ? in the URL (and PGOPTIONS); sslrootcert=system needs sslmode=verify-full",
    )
    NOT_POSTGRESQL = ("what answers there is not PostgreSQL", "correct host and port in the URL")
    # TLS
    TLS_REQUIRED = ("the server requires TLS", "add sslmode=require to the URL")
    TLS_REQUIRED_OR_NOT_ALLOWED = (
        "the server requires TLS, or does not allow this role, database and address",
        "add sslmode=require to the URL; if it is refused still, correct pg_hba.conf or the IP allow-list",
    )
    TLS_NOT_OFFERED = (
        "the server does not offer TLS, which the URL requires",
        "switch TLS on at the server, or lower sslmode in the URL",
    )
    CERTIFICATE_NOT_TRUSTED = (
        "the server's certificate is not trusted",
        "add sslrootcert=FILE with the authority's certificate to the URL (system for a public authority)",
    )
    CERTIFICATE_OF_ANOTHER_HOST = (
        "the server's certificate is for another host name",
        "use the host name that the certificate names, or sslmode=verify-ca",
    )
    ROOT_CERTIFICATE_MISSING = (
        "the file with the trusted certificates is missing",
        "correct sslrootcert in the URL, or use sslmode=verify-full&sslrootcert=system",
    )
    CLIENT_CERTIFICATE = (
        "the server requires a client certificate that it trusts",
        "correct sslcert and sslkey in the URL",
    )
    TLS_FAILED = ("TLS could not be agreed on", "compare the TLS versions of server and client")
    # Role, password, database
    CHANNEL_BINDING = (
        "channel binding is required, and was not possible",
        "remove channel_binding from the URL, or use TLS and SCRAM passwords at the server",
    )
    PASSWORD_MISSING = ("a password is required", "put the password into the URL")
    PASSWORD_REFUSED = (
        "the password was refused",
        "correct the password in the URL; percent-encode its special characters",
    )
    ROLE_MISSING = (
        "the role does not exist or may not log in",
        "correct the user in the URL, or CREATE ROLE … LOGIN",
    )
    DATABASE_MISSING = ("the database does not exist", "correct the database in the URL, or CREATE DATABASE")
    NOT_ALLOWED = (
        "the server does not allow this role, database and address",
        "add a line for them to pg_hba.conf, or to the provider's IP allow-list",
    )
    TOO_MANY_CONNECTIONS = (
        "the server has no connection left",
        "lower DB_POOL_SIZE and DB_MAX_OVERFLOW, use the pooled URL, or raise max_connections",
    )
    STARTUP_OPTION = (
        "the pooler refuses a startup option",
        "remove options=… from the URL (and PGOPTIONS), or connect to the server directly",
    )
    POOLER = (
        "the pooler has no connection to the server",
        "look at the pooler's log: the server is down, full, or refuses the pooler",
    )
    POOL_MODE = (
        "the pooler is in statement mode",
        "set its pool_mode to transaction",
    )
    ENDPOINT = (
        "the provider does not serve this endpoint now",
        "see the provider's console: the endpoint is unknown, disabled, or out of its quota",
    )
    STARTING = ("the server is starting up or recovering", "wait: the worker reconnects")
    STOPPING = ("the server is shutting down or ends connections", "wait: the worker reconnects")
    NO_CONNECTION = (
        "the server refused the connection for a reason that is not known here",
        "see the server's log of this minute",
    )
    # Errors of statements
    POOL_EXHAUSTED = (
        "every connection of the pool is in use",
        "look for locks with clerk-sync db locks, or raise DB_POOL_SIZE or DB_MAX_OVERFLOW",
    )
    SCHEMA_USAGE = ("the role lacks USAGE on the schema", "GRANT USAGE ON SCHEMA to the role")
    TABLE_RIGHTS = (
        "the role lacks a right on a table",
        "GRANT the role what docs/neon-setup.md, Rights, lists for each table",
    )
    DATABASE_RIGHTS = ("the role may not connect to the database", "GRANT CONNECT ON DATABASE to the role")
    CREATE_RIGHTS = (
        "the role may not create or change tables here",
        "run migrations as the role that owns the tables and has CREATE on the schema",
    )
    ROW_SECURITY = (
        "row-level security would hide rows from the role",
        "ALTER ROLE … BYPASSRLS, or let the role own the tables",
    )
    END_RIGHTS = (
        "the role may not end a transaction of another role",
        "GRANT pg_signal_backend to the role, or end it in the program that opened it",
    )
    RIGHTS = ("the role lacks a right", "GRANT it (docs/neon-setup.md, Rights, lists all that are needed)")
    TABLE_MISSING = (
        "a table or column is missing",
        "run clerk-sync db upgrade; if that changes nothing, undo what changed the tables",
    )
    READ_ONLY = ("the database is read-only", "point the URL to the primary; a replica takes no changes")
    DISK_FULL = ("the server's disk is full", "make room, or raise the storage limit")
    OUT_OF_RESOURCES = ("the server is out of memory or of another resource", "see the server's log")
    LOCKED = (
        "another transaction holds a lock",
        "see which with clerk-sync db locks, which can also end it",
    )
    STATEMENT_TIMEOUT = (
        "a statement took too long and was cancelled",
        "look for locks with clerk-sync db locks, for slow triggers, or an overloaded server",
    )
    REFUSED = ("the server refused a statement", "see the server's log of this minute")


# The first match counts: answers of a server or pooler precede failures to reach other addresses.
_TEXTS = {
    Cause.STARTUP_OPTION: r"unsupported startup parameter",
    Cause.URL_OPTION: (
        r"invalid (\w+|\"\w+\") value|weak sslmode|definition of service|requires a value"
        r"|unrecognized configuration parameter|invalid (value for parameter|command-line argument)"
    ),
    Cause.CHANNEL_BINDING: r"channel[_ ]binding",
    Cause.TLS_REQUIRED: r"ssl (is )?required|connection is insecure",
    # The text is the same for `hostnossl … reject` and `host … reject`. With sslmode=prefer libpq tries
    # twice: if the encrypted attempt is refused as well, missing TLS is not the cause.
    Cause.TLS_REQUIRED_OR_NOT_ALLOWED: r"^(?![\s\S]*SSL encryption)[\s\S]*pg_hba\.conf.*no encryption",
    Cause.CLIENT_CERTIFICATE: r"valid client certificate|alert (certificate required|unknown ca)",
    Cause.TLS_NOT_OFFERED: r"does not support SSL",
    Cause.ROOT_CERTIFICATE_MISSING: r"root certificate file .* does not exist|could not read root cert",
    Cause.CERTIFICATE_OF_ANOTHER_HOST: r"server certificate for .* does not match host",
    Cause.CERTIFICATE_NOT_TRUSTED: r"certificate verify failed|self[- ]signed certificate",
    Cause.PASSWORD_MISSING: r"no password supplied|empty password returned",
    Cause.TOO_MANY_CONNECTIONS: r"too many (clients|connections)|connection slots|no more connections",
    Cause.DATABASE_MISSING: r"database .* does not exist|no such database",
    Cause.ROLE_MISSING: r"role .* does not exist|no such user|is not permitted to log in",
    Cause.PASSWORD_REFUSED: r"(password|SASL|SCRAM|MD5) authentication failed|wrong password",
    Cause.DATABASE_RIGHTS: r"permission denied for database",
    Cause.NOT_ALLOWED: r"pg_hba\.conf|not allowed to connect|IP address .* not allowed|login rejected",
    Cause.STARTING: r"starting up|in recovery mode|not (yet )?accepting connections",
    Cause.STOPPING: r"shutting down|administrator command|crash of another server process",
    Cause.ENDPOINT: r"endpoint|quota|compute time",
    Cause.POOL_MODE: r"statement pooling",
    Cause.POOLER: (
        r"pgbouncer cannot connect|server[_ ]login|query_wait_timeout|client_login_timeout"
        r"|database (.* is disabled|removed)"
    ),
    Cause.READ_ONLY: r"session is read-only|server is in hot standby",
    Cause.NOT_POSTGRESQL: r"invalid response to SSL negotiation|expected authentication request",
    Cause.TLS_FAILED: r"SSL error|TLS",
    Cause.HOST_NOT_FOUND: r"failed to resolve host|could not translate host name",
    Cause.CONNECT_TIMEOUT: r"timeout expired|timed out",
    Cause.UNREACHABLE: r"unreachable|no route to host|permission denied",
    Cause.NOTHING_LISTENS: r"connection refused|no such file or directory",
    Cause.NO_ANSWER: r"closed the connection|connection (is |has been )?(closed|lost|reset)",
}

CONNECTION_CLASSES = ("08", "28", "3D")

# The longest matching prefix counts.
_STATES: dict[str, Cause] = {
    "08": Cause.NO_ANSWER,
    "25006": Cause.READ_ONLY,
    "25P03": Cause.NO_ANSWER,
    "25P04": Cause.STATEMENT_TIMEOUT,
    "28": Cause.NOT_ALLOWED,
    "28P01": Cause.PASSWORD_REFUSED,
    "3D000": Cause.DATABASE_MISSING,
    "3F000": Cause.TABLE_MISSING,
    "40": Cause.LOCKED,
    "42501": Cause.RIGHTS,
    "42703": Cause.TABLE_MISSING,
    "42P01": Cause.TABLE_MISSING,
    "53": Cause.OUT_OF_RESOURCES,
    "53100": Cause.DISK_FULL,
    "53300": Cause.TOO_MANY_CONNECTIONS,
    "55P03": Cause.LOCKED,
    "57014": Cause.STATEMENT_TIMEOUT,
    "57P": Cause.STOPPING,
    "57P03": Cause.STARTING,
}
_RIGHTS = {
    Cause.SCHEMA_USAGE: r"permission denied for schema",
    Cause.DATABASE_RIGHTS: r"permission denied for database",
    Cause.TABLE_RIGHTS: r"permission denied for (table|relation|view)",
    Cause.CREATE_RIGHTS: r"must be (the )?owner|permission denied to create",
    # PostgreSQL before 16 names the role that is required
    Cause.END_RIGHTS: r"permission denied to terminate|process is being terminated|to terminate superuser",
}


def cause_of(error: BaseException) -> Cause:
    """Return the cause of an error of psycopg: by its SQLSTATE, else by the text of a failed connection."""
    if not isinstance(error, psycopg.Error) or error.sqlstate is None:
        return _first(_TEXTS, str(error)) or Cause.NO_CONNECTION
    if is_of_trigger(error):
        return Cause.REFUSED
    # the name of the function in PostgreSQL's source is not translated, unlike the text
    state, raised_by = error.sqlstate, error.diag.source_function
    if state.startswith("08"):
        return _first(_TEXTS, str(error)) or Cause.NO_ANSWER
    if state == "42501":
        is_hidden = raised_by == "check_enable_rls"
        return Cause.ROW_SECURITY if is_hidden else _first(_RIGHTS, str(error)) or Cause.RIGHTS
    if state == "0A000" and raised_by == "call_bool_check_hook":  # READ WRITE on a replica
        return Cause.READ_ONLY
    fitting = (state[:length] for length in range(len(state), 1, -1))
    return next((_STATES[prefix] for prefix in fitting if prefix in _STATES), Cause.REFUSED)


def is_of_trigger(error: psycopg.Error) -> bool:
    """Say whether a statement raised an error of a class that otherwise means that there is no connection.

    A trigger does so that cannot reach another server, with dblink for example. If the connection itself is
    at fault, PostgreSQL ends it and the severity is FATAL. A pooler names no function of PostgreSQL's source.
    """
    is_connections = (error.sqlstate or "").startswith(CONNECTION_CLASSES)
    return is_connections and error.diag.severity_nonlocalized == "ERROR" and bool(error.diag.source_function)


def _first(patterns: dict[Cause, str], text: str) -> Cause | None:
    return next((cause for cause, found in patterns.items() if re.search(found, text, re.IGNORECASE)), None)
