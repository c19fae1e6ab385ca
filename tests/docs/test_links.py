"""The links in the documents."""

import re
from pathlib import Path

import pytest

from tests.support.markdown import PAGES, anchors


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_leads_to_a_file_and_a_heading_that_are_there(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        path, _, named = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not named or named in anchors(target.read_text()), link
