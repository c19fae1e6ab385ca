"""Databases and roles beside those of the fixtures, and URLs that lead to another place."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import psycopg
from psycopg import sql

PASSWORD = "let-me-in"


def with_database(url: str, name: str) -> str:
    """Return the URL of another database of the same server."""
    return urlsplit(url)._replace(path=f"/{name}").geturl()


def with_place(url: str, place: str) -> str:
    """Return the URL of another server; `place` is its host and port."""
    parts = urlsplit(url)
    account, at, _ = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{account}{at}{place}").geturl()


def with_account(url: str, user: str, password: str = PASSWORD) -> str:
    """Return the URL for another user."""
    parts = urlsplit(url)
    return parts._replace(netloc=f"{user}:{password}@{parts.netloc.rpartition('@')[2]}").geturl()


@contextmanager
def new_database(admin: psycopg.Connection, name: str, options: str = "") -> Iterator[None]:
    """Make a database for the length of the block."""
    database = sql.Identifier(name)
    admin.execute(sql.SQL("CREATE DATABASE {} {}").format(database, sql.SQL(options)))
    try:
        yield
    finally:
        admin.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(database))


@contextmanager
def encoded_database(url: str, encoding: str) -> Iterator[str]:
    """Make an empty database in that encoding beside the one of `url`, and yield its URL."""
    name = f"encoded_{encoding.lower()}_{os.getpid()}"
    options = f"ENCODING {encoding} TEMPLATE template0 LOCALE_PROVIDER libc LOCALE 'C'"
    with psycopg.connect(url, autocommit=True) as admin, new_database(admin, name, options):
        yield with_database(url, name)


@contextmanager
def new_role(admin: psycopg.Connection, options: str = "") -> Iterator[str]:
    """Make a role without any right of its own that logs in with `PASSWORD`, and yield its name."""
    name = f"role_{os.getpid()}"
    admin.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{PASSWORD}' {options}".encode())
    try:
        yield name
    finally:
        admin.execute(f"RESET ROLE; DROP OWNED BY {name} CASCADE; DROP ROLE {name}".encode())
