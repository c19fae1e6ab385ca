"""Requests of strangers leave a bounded number of lines in the log."""

import time

from flask.testing import FlaskClient
from structlog.testing import capture_logs

from tests.support.deliveries import PATH, genuine, signed
from web.line_limit import FIRST, LineLimit


def test_the_first_lines_of_a_period_pass_and_then_one_has_the_number_of_the_rest() -> None:
    limit = LineLimit(period_s=1)
    with capture_logs() as lines:
        assert [limit.allows() for _ in range(FIRST + 7)] == [True] * FIRST + [False] * 7
        time.sleep(1.5)
        assert limit.allows()
    assert [(line["event"], line["count"]) for line in lines] == [
        ("refused deliveries not logged one by one", 7)
    ]


def test_a_period_in_which_few_came_leaves_no_line_of_its_own() -> None:
    limit = LineLimit(period_s=0.05)
    with capture_logs() as lines:
        assert limit.allows()
        time.sleep(0.3)
    assert lines == []


def test_a_flood_of_forgeries_hides_no_genuine_delivery(client: FlaskClient) -> None:
    with capture_logs() as lines:
        for _ in range(3 * FIRST):
            assert client.post(PATH, data=b"{}").status_code == 400
        assert client.post(PATH, data=genuine(), headers=signed()).status_code == 202
    assert [line["status"] for line in lines] == ["forged"] * FIRST + ["queued"]
