"""A database in an encoding other than UTF8."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import psycopg
from psycopg import sql

CREATE = "CREATE DATABASE {} ENCODING {} TEMPLATE template0 LOCALE_PROVIDER libc LOCALE 'C'"


@contextmanager
def encoded_database(url: str, encoding: str) -> Iterator[str]:
    """Make an empty database in that encoding beside the one of `url`, and yield its URL."""
    name = f"encoded_{encoding.lower()}_{os.getpid()}"
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute(sql.SQL(CREATE).format(sql.Identifier(name), sql.Literal(encoding)))
        try:
            yield urlsplit(url)._replace(path=f"/{name}").geturl()
        finally:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
