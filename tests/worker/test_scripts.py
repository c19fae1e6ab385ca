"""The Lua scripts: each explains its KEYS and ARGV, compiles, and is in the package."""

import re
from importlib.resources import files

import pytest
from redis import Redis

from worker.queue import scripts

FOLDER = files("worker.queue").joinpath("lua")
NAMES = sorted(path.name.removesuffix(".lua") for path in FOLDER.iterdir())
WHOLE = [name for name in NAMES if name not in {"lost", "release_reserved"}]


@pytest.mark.parametrize("name", NAMES)
def test_each_script_explains_the_keys_and_arguments_it_uses(name: str) -> None:
    text = FOLDER.joinpath(f"{name}.lua").read_text()
    used = set(re.findall(r"(?:KEYS|ARGV)\[\d+\]", scripts.COMMENT.sub("", text)))
    explained = set(re.findall(r"^-- ((?:KEYS|ARGV)\[\d+\]) ", text, re.MULTILINE))
    assert used <= explained
    assert text.startswith("-- ")


@pytest.mark.parametrize("name", WHOLE)
def test_each_script_compiles(name: str, redis: Redis) -> None:
    text = scripts.load(name).replace("$common", "'a', 'b'")
    assert "-- " not in text
    redis.script_load(text)
