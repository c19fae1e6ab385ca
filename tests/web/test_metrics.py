import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from cli.dev.servers import RedisServer, free_port
from tests.support import http
from tests.support.deliveries import PATH, MakeClient, signed
from tests.support.payloads import Json, body, deleted_event, user_event
from tests.support.queue import RqView, frozen
from tests.support.settings import MakeSettings
from tests.support.stack import Stack
from tests.support.waiting import wait_until
from worker.monitoring import probes
from worker.monitoring.probes import LIMIT_S


def samples(text: str, name: str) -> list[Sample]:
    families = text_string_to_metric_families(text)
    return [sample for family in families for sample in family.samples if sample.name == name]


def value(text: str, name: str, **labels: str) -> float:
    (found,) = (sample.value for sample in samples(text, name) if sample.labels == labels)
    return float(found)


def test_each_delivery_is_counted_by_type_and_answer(make_client: MakeClient) -> None:
    client = make_client()
    content = body(user_event("user.updated"))
    headers = signed(content)
    client.post(PATH, data=content, headers=headers)
    client.post(PATH, data=content, headers=headers)
    ignored = body({"type": "email.created", "data": {}})
    client.post(PATH, data=ignored, headers=signed(ignored))
    client.post(PATH, data=b"{", headers=signed(b"{"))
    client.post(PATH, data=content, headers=signed(content, age_s=900))
    client.post(PATH, data=content)
    text = client.get("/metrics").text
    for type_, answer in (
        ("user.updated", "queued"),
        ("user.updated", "duplicate"),
        ("other", "ignored"),
        ("other", "not_json"),
    ):
        assert value(text, "clerk_sync_deliveries_total", type=type_, answer=answer) == 1
    assert value(text, "clerk_sync_deliveries_total", type="other", answer="forged") == 2
    assert value(text, "clerk_sync_rejected_signatures_total", reason="stale") == 1
    assert value(text, "clerk_sync_rejected_signatures_total", reason="missing") == 1
    assert value(text, "clerk_sync_enqueue_seconds_count") == 2


def test_without_redis_the_metrics_still_answer_and_say_so(make_client: MakeClient) -> None:
    client = make_client(redis_url="redis://127.0.0.1:1/0")
    content = body(user_event())
    assert client.post(PATH, data=content, headers=signed(content)).status_code == 503
    began = time.monotonic()
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert value(answer.text, "clerk_sync_redis_up") == 0
    assert time.monotonic() - began < 2 * LIMIT_S


def test_a_redis_that_hangs_is_not_waited_for_longer_than_the_limit(
    make_client: MakeClient, own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "LIMIT_S", 1)
    client = make_client(redis_url=own_redis.url)
    assert value(client.get("/metrics").text, "clerk_sync_redis_up") == 1
    with frozen(own_redis):
        began = time.monotonic()
        assert value(client.get("/metrics").text, "clerk_sync_redis_up") == 0
        assert time.monotonic() - began < 2 * LIMIT_S


def test_metrics_sum_all_processes_and_outlive_them(
    make_settings: MakeSettings, tmp_path: Path, rq: RqView
) -> None:
    settings = make_settings(port=free_port(), web_workers=2)
    with Stack(settings, tmp_path, workers=2) as stack:

        def deliver(event: Json) -> str:
            content = body(event)
            headers = {**signed(content), "Connection": "close"}
            assert http.post(stack.url, content=content, headers=headers).status_code == 202
            return headers["svix-id"]

        for _ in range(40):
            deliver(user_event())
        applied = {"type": "user.created", "outcome": "applied"}
        wait_until(lambda: _sum(_scrape(stack), "clerk_sync_events_applied_total") == 40, 20, stack.logs)
        wait_until(lambda: _sum(_scrape(stack), "clerk_sync_deliveries_total") == 40, 20, stack.logs)
        text = _scrape(stack)
        assert value(text, "clerk_sync_events_applied_total", **applied) == 1
        assert value(text, "clerk_sync_deliveries_total", type="user.created", answer="queued") == 40
        assert value(text, "clerk_sync_workers_alive") == 2
        assert value(text, "clerk_sync_delivery_lag_seconds_count") == 40
        assert {sample.value for sample in samples(text, "clerk_sync_pool_size")} == {5}
        deliver(deleted_event())
        stack.web.end()
        stack.web.start()
        stack.await_ready()
        text = _scrape(stack)
        assert _sum(text, "clerk_sync_deliveries_total") == 41, (
            "what was not flushed yet went with the process"
        )
        stack.workers[1].end()
        deliver(user_event())
        wait_until(lambda: _sum(_scrape(stack), "clerk_sync_events_applied_total") == 42, 20, stack.logs)
        last = deliver(user_event())  # the only worker flushed just now
        wait_until(lambda: rq.status(last) == "finished", 20, stack.logs)
        stack.workers[0].end()
        assert _sum(_scrape(stack), "clerk_sync_events_applied_total") == 43


def _scrape(stack: Stack) -> str:
    answer = http.get(f"{stack.base_url}/metrics", timeout=10)
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return answer.text


def _sum(text: str, name: str) -> float:
    return float(sum(sample.value for sample in samples(text, name)))
