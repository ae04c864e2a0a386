"""The operator's probes, as a kubelet asks for them."""

import asyncio
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable

from cptjob_operator.serving import Probes, serve
from testplane.ports import free_ports


def _ask(port: int, path: str, seconds: float = 30.0) -> tuple[int, str]:
    """Status code and text; 0 when there is no answer in time."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=seconds) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def _serving(probes: Probes, ports: list[int], test: Callable[[], Awaitable[None]]) -> None:
    """Runs `test` while they are served."""

    async def both() -> None:
        serving = asyncio.ensure_future(serve(probes, lambda: b"figure 1\n", *ports))
        while (await asyncio.to_thread(_ask, ports[-1], "metrics"))[0] == 0:
            assert not serving.done()
        await test()
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)

    asyncio.run(both())


def test_each_probe_answers_with_what_is_wrong_at_that_moment() -> None:
    wrong = {"healthz": "", "readyz": "not yet"}
    ports = free_ports(2)

    async def test() -> None:
        for sick, unready in (("", "not yet"), ("a watch is dead", ""), ("", "")):
            wrong.update(healthz=sick, readyz=unready)
            for name, words in wrong.items():
                said = await asyncio.to_thread(_ask, ports[0], name)
                assert said == ((503, f"{words}\n") if words else (200, "ok\n"))
        assert await asyncio.to_thread(_ask, ports[0], "metrics") == (404, "404: Not Found")
        assert await asyncio.to_thread(_ask, ports[1], "metrics") == (200, "figure 1\n")

    _serving(Probes(lambda: wrong["healthz"], lambda: wrong["readyz"]), ports, test)


def test_one_port_may_serve_everything() -> None:
    (port,) = free_ports(1)

    async def test() -> None:
        answers = [await asyncio.to_thread(_ask, port, name) for name in ("healthz", "metrics")]
        assert answers == [(200, "ok\n"), (200, "figure 1\n")]

    _serving(Probes(str, str), [port, port], test)


def test_a_loop_that_is_stuck_answers_no_probe() -> None:
    """So that the kubelet starts the container anew: nothing beside the loop speaks for it."""
    ports, answers = free_ports(2), list[int]()

    async def test() -> None:
        stuck = threading.Event()

        def probe() -> None:
            stuck.wait()
            answers.append(_ask(ports[0], "healthz", seconds=0.5)[0])

        kubelet = threading.Thread(target=probe)
        kubelet.start()
        stuck.set()
        while kubelet.is_alive():
            time.sleep(0.01)  # the loop is stuck until then
        assert await asyncio.to_thread(_ask, ports[0], "healthz") == (200, "ok\n")

    _serving(Probes(str, str), ports, test)
    assert answers == [0]
