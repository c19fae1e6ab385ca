"""The settings: one frozen object, and the only reader of the environment.

A value that is missing or wrong ends the command at its start, with one line that names the variable and
never shows the value.
"""

import base64
import binascii
import re
import ssl
from collections.abc import Iterable
from ipaddress import ip_address
from typing import Annotated, Any, Literal
from urllib.parse import SplitResult, urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

# Each of these words occurs in fewer than one of a million random secrets.
PLACEHOLDER_WORDS = re.compile(
    "placeholder|replace|changeme|example|dummy|yoursecret|yourclerk|yourwebhook|webhooksecret|signingsecret",
    re.IGNORECASE,
)
HEADER_TEXT = re.compile("[!-~]+")
USER_INFO = re.compile("^[^@/]*@")
DATABASE_NUMBER = re.compile("/?[0-9]*/?")
HOST_AND_PORT = re.compile(r"(\[[^\[\]]+\]|[^:@\[\]]*)(:[0-9]{0,5})?")  # libpq accepts several, by comma
INSTANCE_ID = re.compile("[A-Za-z0-9_-]{1,200}")
SCHEMA_NAME = re.compile("(?!pg_)[A-Za-z_][A-Za-z0-9_-]{0,62}")
DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)([smhd]?)")
DURATION_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
FIELD_NAME = re.compile("[a-z][a-z0-9_]{0,99}")
MIN_SECRET_BYTES = 16  # Svix generates 24 and accepts 24 to 64; its published test vector has 18.


class ServiceError(Exception):
    """An error of this service. Its message is safe to show: no secret, no personal data.

    `retryable` says whether trying again later can help.
    """

    retryable: bool = False


class SettingsError(ServiceError):
    """The environment cannot be used; the message is one line that names each variable and shows no value."""


def decode_signing_secret(secret: str) -> bytes:
    """Return the key inside a `whsec_` secret.

    Raises ValueError when the secret is malformed, or is a placeholder that was not replaced.
    """
    prefix, _, encoded = secret.partition("_")
    if prefix != "whsec" or not encoded:
        raise ValueError("must begin with whsec_ (Clerk dashboard, Webhooks, the endpoint, Signing Secret)")
    if PLACEHOLDER_WORDS.search(encoded):
        raise ValueError("is a placeholder: put the endpoint's own signing secret there")
    try:
        key = base64.b64decode(encoded, validate=True)
    except binascii.Error:
        raise ValueError("is malformed: copy the whole signing secret, it is base64 after whsec_") from None
    if len(key) < MIN_SECRET_BYTES:
        raise ValueError("is cut short: copy the whole signing secret")
    if len(set(key)) < MIN_SECRET_BYTES // 2:
        raise ValueError("is a placeholder: put the endpoint's own signing secret there")
    return key


def _check_names(names: tuple[str, ...]) -> tuple[str, ...]:
    if not all(FIELD_NAME.fullmatch(name) for name in names):
        raise ValueError("must name fields of Clerk's user object, separated by commas")
    return tuple(dict.fromkeys(names))


def _split(value: object) -> object:
    if not isinstance(value, str):
        return value
    return tuple(part for part in re.split(r"[\s,]+", value) if part)


def _check_secrets(secrets: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
    for secret in secrets:
        decode_signing_secret(secret.get_secret_value())
    return secrets


def _split_url(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port
        (parts.hostname or "").encode("idna")  # as Python does before it looks the name up
    except ValueError:
        raise ValueError("is not a valid URL") from None
    return parts


def _check_redis_url(value: SecretStr) -> SecretStr:
    parts = _split_url(value.get_secret_value())
    if parts.scheme not in {"redis", "rediss", "unix"}:
        raise ValueError("must begin with redis://, rediss:// or unix://")
    if parts.scheme != "unix" and not DATABASE_NUMBER.fullmatch(parts.path):
        raise ValueError("must end with the number of a database, such as /0, or without any")
    return value


def _check_postgres_url(value: SecretStr) -> SecretStr:
    """Check scheme, hosts and ports; `db.connection.url` checks the rest with libpq."""
    scheme, _, rest = value.get_secret_value().partition("://")
    if scheme not in {"postgres", "postgresql"}:
        raise ValueError("must begin with postgres:// or postgresql://")
    # For libpq the first @ ends user and password: it would look up "word@host" in the DNS.
    hosts = re.split("[/?]", USER_INFO.sub("", rest), maxsplit=1)[0]
    if not all(HOST_AND_PORT.fullmatch(host) for host in hosts.split(",")):
        raise ValueError(
            "has a host or port that cannot be read: percent-encode special characters of the password"
        )
    return value


def _check_header_text(value: SecretStr) -> SecretStr:
    # An HTTP client's error about an invalid header would quote the value.
    if not HEADER_TEXT.fullmatch(value.get_secret_value()):
        raise ValueError("must be printable ASCII without spaces: copy all of it")
    return value


def _check_host(value: str) -> str:
    try:
        return str(ip_address("127.0.0.1" if value == "localhost" else value.strip("[]")))
    except ValueError:
        raise ValueError("must be an address to listen on, like 0.0.0.0, 127.0.0.1, :: or ::1") from None


def _check_api_url(value: str) -> str:
    parts = _split_url(value)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("must begin with https:// or http:// and name a host")
    return value.rstrip("/").removesuffix("/v1")


def _read_duration(value: object) -> object:
    if not isinstance(value, str):
        return value
    found = DURATION.fullmatch(value)
    if found is None:
        raise ValueError("must be a number of seconds, or like 90s, 30m, 6h or 1d")
    return float(found[1]) * DURATION_UNITS[found[2]]


def _check_certificates(value: str) -> str:
    try:
        ssl.create_default_context(cafile=value)
    except ssl.SSLError:
        raise ValueError("must name a file of certificates in PEM format") from None
    except OSError as error:
        raise ValueError(f"must name a file that can be read ({type(error).__name__})") from None
    return value


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


def _check_instance(value: str) -> str:
    # With any other id every delivery is ignored, and Clerk does not deliver it again.
    if not INSTANCE_ID.fullmatch(value):
        raise ValueError("must be the id of one Clerk instance, without quotes, like ins_2abc")
    return value


def _check_key(value: str) -> str:
    # Docker's --env-file keeps quotes, and no metadata has a key in them.
    if value[0] in "'\"" and value[0] == value[-1]:
        raise ValueError("is in quotes: remove them")
    return value


def _check_schema(value: str) -> str:
    if not SCHEMA_NAME.fullmatch(value) or value == "information_schema":
        raise ValueError("must be up to 63 letters, digits, _ or -, and not begin with a digit, - or pg_")
    return value


FieldNames = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split), AfterValidator(_check_names)]
PostgresUrl = Annotated[SecretStr, AfterValidator(_check_postgres_url)]
RedisUrl = Annotated[SecretStr, AfterValidator(_check_redis_url)]
Secrets = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split), AfterValidator(_check_secrets)]
HeaderSecret = Annotated[SecretStr, AfterValidator(_check_header_text)]
SchemaName = Annotated[str, AfterValidator(_check_schema)]
InstanceId = Annotated[str, AfterValidator(_check_instance)]
MetadataKey = Annotated[str, AfterValidator(_check_key)]
Host = Annotated[str, AfterValidator(_check_host)]
ApiUrl = Annotated[str, AfterValidator(_check_api_url)]
Duration = Annotated[float, BeforeValidator(_read_duration)]
CertificateFile = Annotated[str, AfterValidator(_check_certificates)]
LogLevel = Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(_upper)]


class Settings(BaseSettings):
    """The settings. Each field is the environment variable of the same name in upper case."""

    model_config = SettingsConfigDict(
        env_file=".env",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
    )

    clerk_webhook_signing_secret: Secrets = ()
    database_url: PostgresUrl | None = None
    database_url_unpooled: PostgresUrl | None = None
    database_schema: SchemaName | None = None
    redis_url: RedisUrl | None = None
    redis_ssl_cert_reqs: Literal["required", "none"] | None = None
    redis_ssl_ca_certs: CertificateFile | None = None
    redis_max_connections: int = Field(8, ge=6, le=200, description="of one process")
    clerk_secret_key: HeaderSecret | None = None
    clerk_api_url: ApiUrl = "https://api.clerk.com"
    clerk_instance_id: InstanceId | None = None

    host: Host = "0.0.0.0"  # noqa: S104 - Clerk comes from outside
    port: int = Field(8000, ge=0, le=65535)
    web_workers: int = Field(2, ge=1, le=64)
    max_body_bytes: int = Field(1024 * 1024, ge=1024, le=4 * 1024 * 1024)
    max_queue_depth: int = Field(1_000_000, ge=1)

    db_pool_size: int = Field(5, ge=1, le=200)
    db_max_overflow: int = Field(5, ge=0, le=200)
    db_pool_timeout: float = Field(10, gt=0, le=300, description="s")

    batch_size: int = Field(500, ge=1, le=500)
    shutdown_seconds: float = Field(25, gt=0, le=600, description="s")
    user_deletion: Literal["delete", "anonymize"] = "delete"
    role_source: Literal["metadata", "none"] = "metadata"
    role_metadata_key: MetadataKey = "role"
    organization_source: Literal["metadata", "membership", "none"] = "metadata"
    organization_value: Literal["name", "id", "slug"] = "name"
    organization_metadata_key: MetadataKey = "organization"
    profile_fields: FieldNames = ()
    event_retention_days: int = Field(30, ge=1, le=36_500)
    silence_alarm_minutes: float | None = Field(None, gt=0)
    reconcile_every: Duration | None = Field(None, ge=1, description="s")
    reconcile_max_delete: float = Field(5, ge=0, le=100, description="%")

    log_level: LogLevel = "INFO"
    log_format: Literal["console", "json"] | None = None
    console_password: SecretStr | None = None
    pull_token: HeaderSecret | None = None

    @field_validator("reconcile_every", "pull_token")
    @classmethod
    def _needs_the_api(cls, value: object, info: ValidationInfo) -> object:
        if value is not None and info.data.get("clerk_secret_key") is None:
            raise ValueError("is set but needs CLERK_SECRET_KEY, which is not set")
        return value

    @model_validator(mode="before")
    @classmethod
    def _strip(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Strip the white space around every value; a value of white space alone counts as not set."""
        stripped = {key: value.strip() if isinstance(value, str) else value for key, value in values.items()}
        return {key: value for key, value in stripped.items() if value != ""}

    @property
    def signing_keys(self) -> tuple[bytes, ...]:
        """The keys of every configured signing secret, in their order."""
        return tuple(decode_signing_secret(s.get_secret_value()) for s in self.clerk_webhook_signing_secret)


def load(*required: str, **overrides: Any) -> Settings:
    """Read the settings from the environment and, in development, from `.env`.

    `required` names the fields that the command needs; `overrides` replace the values of the environment.
    Raises SettingsError naming every variable that is missing or wrong.
    """
    try:
        settings = Settings(**overrides)
    except ValidationError as error:
        raise SettingsError("; ".join(sorted(set(_problems(error))))) from None
    except UnicodeDecodeError:
        raise SettingsError(".env is not written in UTF-8") from None
    except PermissionError:
        raise SettingsError(
            ".env in the working directory may not be read: let this user read it, or start somewhere else"
        ) from None
    missing = [name.upper() for name in required if not getattr(settings, name)]
    if missing:
        raise SettingsError("; ".join(f"{name} is not set" for name in missing))
    return settings


def _problems(error: ValidationError) -> Iterable[str]:
    for problem in error.errors(include_input=False, include_context=False, include_url=False):
        variable = str(problem["loc"][0]).upper()
        message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        if problem["type"] in {"int_parsing", "float_parsing"}:
            message = "must be a number"
        separator = " " if message.startswith(("is ", "must ", "has ")) else ": "
        yield f"{variable}{separator}{message}"
