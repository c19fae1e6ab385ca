"""The receiver: its rate and latency, also with PostgreSQL stopped."""

from tests.bench.cpu import OWN, CpuClock
from tests.bench.figures import ComparedCase, Figures
from tests.bench.harness import Bench, Endpoint
from tests.bench.load import LoadReport
from tests.bench.plan import BenchPlan, Setting, rounds

PART = "receiver"
OURS = "clerk-sync web"
OURS_RECONNECTING = "clerk-sync web, a connection per delivery"
OURS_WITH_POSTGRES = "clerk-sync web, PostgreSQL running"
OURS_WITHOUT_POSTGRES = "clerk-sync web, PostgreSQL stopped"
ECHO = "Flask echo, gunicorn sync"
INLINE = "inline Flask handler, gunicorn sync"
RATE, P50, P99, FAILED = "deliveries/s", "p50 ms", "p99 ms", "failed"
CONNECTIONS = 16
WARM_UP_S = 0.5
MOST_PER_S = 6_000  # more than any of the receivers answers


def measure(bench: Bench, plan: BenchPlan, figures: Figures) -> None:
    """Measure closed loops with CONNECTIONS, all receivers in turn; no worker runs."""
    _measure_local(bench, plan, figures)
    _measure_far(bench, plan, figures)
    _measure_without_postgres(bench, plan, figures)
    _check(figures)


def closed_loop(
    bench: Bench, endpoint: Endpoint, seconds: float, *, keep_alive: bool = True
) -> tuple[LoadReport, dict[str, float]]:
    """Deliver as fast as the receiver answers; return the report and the CPU time per delivery.

    The report does not count a warm-up.
    """
    seconds += WARM_UP_S
    clock = CpuClock(bench, {OWN: endpoint.process.pid})
    report = bench.load(
        endpoint,
        seconds=seconds,
        deliveries=int(seconds * MOST_PER_S),
        connections=CONNECTIONS,
        warm_up_s=WARM_UP_S,
        keep_alive=keep_alive,
    )
    return report, clock.per_delivery(report)


def _measure_local(bench: Bench, plan: BenchPlan, figures: Figures) -> None:
    local = Setting.LOCAL
    with (
        bench.web(local) as ours,
        bench.gunicorn("echo_app", local) as echo,
        bench.gunicorn("inline_app", local) as inline,
    ):
        receivers = {ECHO: echo, OURS: ours, OURS_RECONNECTING: ours, INLINE: inline}
        for _ in range(plan.rounds):
            for subject, endpoint in receivers.items():
                bench.clear()
                keep_alive = subject != OURS_RECONNECTING
                _add(
                    figures, subject, local, *closed_loop(bench, endpoint, plan.load_s, keep_alive=keep_alive)
                )


def _measure_far(bench: Bench, plan: BenchPlan, figures: Figures) -> None:
    for setting in (Setting.POSTGRES, Setting.BOTH):
        with bench.web(setting) as ours, bench.gunicorn("inline_app", setting) as inline:
            for _ in range(rounds(plan, setting)):
                for subject, endpoint in ((OURS, ours), (INLINE, inline)):
                    bench.clear()
                    _add(figures, subject, setting, *closed_loop(bench, endpoint, plan.load_s))


def _measure_without_postgres(bench: Bench, plan: BenchPlan, figures: Figures) -> None:
    local = Setting.LOCAL
    with bench.web(local) as ours:
        for _ in range(plan.rounds):
            bench.clear()
            _add(figures, OURS_WITH_POSTGRES, local, *closed_loop(bench, ours, plan.load_s))
            bench.clear()
            bench.postgres.stop()
            try:
                _add(figures, OURS_WITHOUT_POSTGRES, local, *closed_loop(bench, ours, plan.load_s))
            finally:
                bench.postgres.start()


def _add(
    figures: Figures, subject: str, setting: Setting, report: LoadReport, cpu_us: dict[str, float]
) -> None:
    sample = {RATE: report.rate, P50: report.p50_ms, P99: report.p99_ms, FAILED: report.failed}
    figures.add(ComparedCase(PART, subject, setting), {**sample, **cpu_us})


def _check(figures: Figures) -> None:
    def case(subject: str, setting: Setting = Setting.LOCAL) -> ComparedCase:
        return ComparedCase(PART, subject, setting)

    ours, reconnecting, echo = case(OURS), case(OURS_RECONNECTING), case(ECHO)
    figures.compare("receiver : Flask echo", ours, echo, RATE, at_least=0.75)
    text = "receiver, a connection per delivery : Flask echo"
    figures.compare(text, reconnecting, echo, RATE, at_least=0.75)
    for setting in Setting:
        figures.compare("receiver : inline Flask handler", case(OURS, setting), case(INLINE, setting), RATE)
    figures.check("receiver, p99", Setting.LOCAL, figures.median(ours, P99), "ms", at_most=50)
    stopped, running = case(OURS_WITHOUT_POSTGRES), case(OURS_WITH_POSTGRES)
    figures.compare("receiver, PostgreSQL stopped : running", stopped, running, RATE, at_least=0.9)
