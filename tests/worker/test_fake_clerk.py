"""The fake of Clerk's API answers as Clerk's own description says."""

import httpx
import pytest

from tests.support import http
from tests.support.fake_clerk import FakeClerk
from tests.support.payloads import ANN, BEN, user


def get(clerk: FakeClerk, path: str) -> httpx.Response:
    headers = {"Authorization": f"Bearer {clerk.key}"}
    return http.get(f"{clerk.url}/v1{path}", headers=headers)


@pytest.mark.parametrize(
    ("query", "ids"),
    [
        (f"user_id={BEN}", [BEN]),
        ("email_address=ann@example.com", [ANN]),
        ("username=ben", [BEN]),
        ("external_id=7&external_id=8", [BEN]),
        ("username=unknown", []),
        ("", [BEN, ANN]),
    ],
)
def test_filters_leave_the_same_users_in_the_list_and_in_the_count(
    clerk: FakeClerk, query: str, ids: list[str]
) -> None:
    clerk.put(user(ANN, "ann@example.com", username=None), user(BEN, username="ben", external_id="7"))
    assert [each["id"] for each in get(clerk, f"/users?{query}").json()] == ids
    assert get(clerk, f"/users/count?{query}").json()["total_count"] == len(ids)


def test_a_429_has_a_body_and_says_how_long_to_wait(clerk: FakeClerk) -> None:
    clerk.rate_limit = 1
    for _ in range(2):
        refused = get(clerk, "/users")
    assert refused.status_code == 429
    assert refused.json()["errors"][0]["code"] == "too_many_requests"
    assert int(refused.headers["Retry-After"]) > 0
    clerk.answer_next(429, headers={"Retry-After": "1"})
    assert get(clerk, "/users").json()["errors"][0]["code"] == "too_many_requests"
