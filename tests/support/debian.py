"""Debian's PostgreSQL 15: another version than the embedded one, and built with TLS."""

from pathlib import Path

from cli.dev.servers import PostgresServer

DEBIAN = Path("/usr/lib/postgresql/15/bin/postgres")


class DebianServer(PostgresServer):
    """Debian's PostgreSQL 15."""

    def _binary(self) -> Path:
        return DEBIAN

    def _arguments(self) -> list[str]:
        return [argument for argument in super()._arguments() if "scram_iterations" not in argument]

    def _create_data(self, binary: Path) -> None:
        initdb = binary.with_name("initdb")
        options = ["--username=postgres", "--auth=reject", "--encoding=UTF8", "--locale=C", "--no-sync"]
        self._run([initdb, "-D", self.data, *options])
        statement = f"ALTER ROLE postgres PASSWORD '{self.password}'"
        self._run([binary, "--single", "-D", self.data, "postgres"], statement)
