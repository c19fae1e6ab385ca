"""Loads the Lua scripts that move jobs: one file each in `lua/`, which explains its KEYS and ARGV.

Each script is atomic: a process killed at any instruction loses no job. A job's id is at any moment in one
of: the queue's list, the reserved list of one consumer (a thread of a worker), or a registry of RQ. The field
`status` of its hash says the same. Key names and hash fields are RQ's own (see `worker.queue.rq_format`), so
that RQ's tools read and move the same jobs.

A full Redis refuses a script only at its first write, and only if that write needs memory. Later commands are
never refused, so no script stops half-way. The receiver's script begins with a write that needs memory. A
worker's script begins with one that needs none (ZREM, LREM, RPOP), because the work of a worker frees memory.
Source: redis.io, "Scripting with Lua", on scripts when memory has run out.
"""

import re
from functools import cache
from importlib.resources import files

INCLUDE = re.compile(r"^-- include (\w+)$", re.MULTILINE)
COMMENT = re.compile(r"^ *--.*\n", re.MULTILINE)


@cache
def load(name: str) -> str:
    """Return the script in `lua/<name>.lua`, with the files that it includes and without comments."""
    text = files(__package__).joinpath("lua", f"{name}.lua").read_text(encoding="utf-8")
    return COMMENT.sub("", INCLUDE.sub(lambda match: load(match[1]), text))
